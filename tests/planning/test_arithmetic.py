"""From prompts to optimizer steps, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gipo_megatron.planning.arithmetic import Call, Iteration
from gipo_megatron.recipe.schema import Batch


def iteration(batch: Batch, replicas: int, max_length: int, *calls: Call) -> Iteration:
    data = SimpleNamespace(max_length=max_length)
    recipe: Any = SimpleNamespace(batch=batch, data_parallel=replicas, data=data)
    return Iteration(recipe, (), (), calls)


def update(role: str, count: int, rows: int, sequences_per_row: int = 1) -> Call:
    sequences = count * rows * sequences_per_row
    return Call(f"{role} update", "update", role, count * rows, sequences, count)


ROLLOUT = Call("rollout", "generate", "actor", 256, 256)


def test_rollouts_by_hand() -> None:
    scoring, actor = Call("reward scores", "forward", "reward", 256, 256), update("actor", 8, 64)
    sizes = Batch(prompts=64, responses=4, minibatch=64, micro_batch=2)
    batch = iteration(sizes, 4, 512, ROLLOUT, scoring, update("critic", 8, 64), actor)
    assert (batch.rows_per_replica, batch.slots_of(scoring), batch.slots_of(actor)) == (64, 32, 8)
    assert (batch.tokens(scoring), batch.tokens(actor)) == (131072, 262144)
    assert batch.lines() == [
        "64 prompts × 4 responses = 256 sequences an iteration",
        "256 sequences / 4 replicas = 64 each, of at most 512 tokens",
        "64 sequences an optimizer step = 4 replicas × 8 micro-batches of 2",
        "2 epochs × 256 / 64 = 8 optimizer steps an iteration, of each model that is trained",
    ]


def test_a_token_budget_by_hand() -> None:
    """Rows of 512 tokens, four in a budget of 2100; pairs of 2 × 512, two."""
    sizes = Batch(prompts=64, responses=4, minibatch=64, micro_batch=None, micro_tokens=2100)
    batch = iteration(sizes, 4, 512, ROLLOUT, update("actor", 8, 64))
    assert [batch.slots(rows) for rows in (256, 64, 17)] == [16, 4, 2]
    assert batch.lines()[2] == (
        "64 sequences an optimizer step = 4 replicas × 4 micro-batches of at most 2100 tokens"
    )
    step = update("reward", 1, 6, sequences_per_row=2)
    sizes = Batch(minibatch=6, micro_batch=None, micro_tokens=2100)
    assert iteration(sizes, 1, 512, step).slots_of(step) == 3


def test_models_that_take_different_numbers_of_steps() -> None:
    """Three steps of 64 are no whole number of passes over 256 rows."""
    sizes = Batch(prompts=64, responses=4, minibatch=64, micro_batch=4)
    batch = iteration(sizes, 1, 512, ROLLOUT, update("critic", 8, 64), update("actor", 3, 64))
    assert batch.lines()[-2:] == [
        "critic: 2 epochs × 256 / 64 = 8 optimizer steps an iteration",
        "actor: 3 optimizer steps an iteration",
    ]


def test_pairs_are_two_sequences() -> None:
    step = update("reward", 1, 6, sequences_per_row=2)
    batch = iteration(Batch(minibatch=6, micro_batch=4), 1, 100, step)
    assert (batch.tokens(step), batch.slots_of(step), batch.sequences_per_row) == (1200, 2, 2)
    assert batch.lines()[0] == "6 pairs / 1 replica = 6 each, of at most 100 tokens"
