"""From prompts to optimizer steps, by hand."""

from __future__ import annotations

from gipo_megatron.planning.arithmetic import BatchPlan
from gipo_megatron.planning.counting import Call


def test_rollouts_by_hand() -> None:
    batch = BatchPlan(
        replicas=4,
        rows=256,
        sequences_per_row=1,
        minibatch=64,
        micro_batch=2,
        updates={"critic": 8, "actor": 8},
        prompts=64,
        max_length=512,
    )
    scoring = Call("reward scores", "forward", "reward", rows=256, sequences=256)
    training = Call("actor update", "update", "actor", rows=512, sequences=512, count=8)
    assert (batch.rows_per_replica, batch.slots_of(scoring), batch.slots_of(training)) == (
        64,
        32,
        8,
    )
    assert (batch.tokens(scoring), batch.tokens(training)) == (131072, 262144)
    assert batch.lines() == [
        "64 prompts × 4 responses = 256 sequences an iteration",
        "256 sequences / 4 replicas = 64 each, of at most 512 tokens",
        "64 sequences an optimizer step = 4 replicas × 8 micro-batches of 2",
        "2 epochs × 256 / 64 = 8 optimizer steps an iteration, of each model that is trained",
    ]


def test_models_that_take_different_numbers_of_steps() -> None:
    """Three steps of 64 are no whole number of passes over 256 rows."""
    batch = BatchPlan(1, 256, 1, 64, 4, {"critic": 8, "actor": 3}, 64, 512)
    assert batch.lines()[-2:] == [
        "critic: 2 epochs × 256 / 64 = 8 optimizer steps an iteration",
        "actor: 3 optimizer steps an iteration",
    ]


def test_pairs_are_two_sequences() -> None:
    batch = BatchPlan(1, 6, 2, 6, 4, {"reward": 1}, None, 100)
    update = Call("reward update", "update", "reward", rows=6, sequences=12)
    assert (batch.tokens(update), batch.slots_of(update)) == (1200, 2)
    assert batch.lines()[0] == "6 pairs / 1 replica = 6 each, of at most 100 tokens"
