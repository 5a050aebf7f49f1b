"""The calls of a page, found by running it with counting roles."""

from __future__ import annotations

import random
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.planning.arithmetic import BATCH, Call, Iteration, added_up
from gipo_megatron.planning.counting import LATE, Table, count
from gipo_megatron.recipe.compose import compose
from gipo_megatron.roles import SingleReplica
from gipo_megatron.training import assembly
from tests.parity.planning_cases import RECIPES
from tests.recipe.helpers import small

pytestmark = pytest.mark.global_rng  # imports what a recipe's names need
PLUGIN = "plugins=[tests.planning.pages]"


def counted(*words: str) -> Iteration:
    return count(compose(words, RECIPES))


def brief(calls: tuple[Call, ...]) -> list[tuple[str, str, int, int]]:
    return [(call.verb, call.role, call.rows, call.sequences) for call in calls]


def forward_equivalents(found: Iteration) -> int:
    """Sequences in all passes over the batch; an update is worth three forward passes."""
    weights = {"generate": 1, "forward": 1, "update": 3}
    batch = [call for call in found.calls if call.reads == BATCH]
    return sum(call.sequences * weights[call.verb] for call in batch)


def test_examples_and_pairs() -> None:
    """64 rows; a pair is two sequences."""
    assert brief(counted("recipe=hh_sft").calls) == [("update", "actor", 64, 64)]
    assert brief(counted("recipe=hh_rm").calls) == [("update", "reward", 64, 128)]


def test_a_reference_is_called_for_each_batch_or_once() -> None:
    live = counted("recipe=hh_dpo", "algorithm.precompute=false")
    assert live.built == ("actor", "reference") and live.once == ()
    assert brief(live.calls) == [("forward", "reference", 64, 128), ("update", "actor", 64, 128)]
    first = counted("recipe=hh_dpo")
    assert first.built == ("actor",) and brief(first.calls) == [("update", "actor", 64, 128)]
    assert [(call.verb, call.role) for call in first.once] == [("forward", "reference")]


def test_a_gold_model_takes_memory_but_no_time() -> None:
    """It is built with the others, and scores no row of an iteration."""
    plain = counted("recipe=hh_gipo")
    found = counted("recipe=hh_gipo", "models.gold.load=runs/hh_rm_gold/final")
    assert "gold" not in plain.built and set(found.built) == {*plain.built, "gold"}
    assert brief(found.calls) == [*brief(plain.calls), ("forward", "gold", 0, 0)]
    assert forward_equivalents(found) == forward_equivalents(plain)


def test_a_rollout_and_its_updates() -> None:
    """64 prompts x 4 responses, minibatches of 64, two epochs, groups that are learned. The chosen
    responses are scored, too."""
    work = counted("recipe=hh_gipo", "algorithm.epochs=2", "algorithm.rollout.top_k=7")
    assert brief(work.calls) == [
        ("generate", "actor", 256, 256),
        *[("forward", "reward", 256, 256)] * 2,
        ("forward", "actor", 256, 256),
        ("forward", "reference", 256, 256),
        ("forward", "critic", 256, 256),
        *[("update", "critic", 64, 64)] * 8,
        *[("update", "actor", 64, 64)] * 8,
        ("forward", "critic", 16, 16),
    ]
    assert work.calls[-1].name == "group probe"
    assert sorted(work.built) == ["actor", "critic", "reference", "reward"]
    sampling = work.calls[0].sampling
    assert sampling is not None and (sampling.top_k, sampling.max_response) == (7, 512)


def test_a_server_generates_in_the_actors_place() -> None:
    """The same calls; the rollout's has the sampler, whose keys describe the server."""
    own = counted("recipe=hh_gipo")
    work = counted("recipe=hh_gipo", "algorithm.rollout={name: vllm, serve: {tensor_parallel: 8}}")
    assert brief(work.calls) == brief(own.calls) and work.built == own.built
    server = work.calls[0].server
    assert server is not None and server.serve.tensor_parallel == 8
    assert all(call.server is None for call in (*own.calls, *work.calls[1:]))


def test_rows_that_are_mixed_in_are_counted() -> None:
    """ptx adds a minibatch of examples to each of the actor's updates."""
    work = counted("recipe=hh_ppo_kl", "algorithm.ptx=0.1")
    updates = [call for call in added_up(work.calls) if call.verb == "update"]
    assert [(call.role, call.rows, call.count) for call in updates] == [
        ("critic", 256, 4),
        ("actor", 512, 4),
    ]


def test_rewards_call_as_many_models_as_they_have() -> None:
    ensemble = "algorithm.reward={name: ensemble, members: [reward_a, reward_b]}"
    loads = ("models.reward_a.load=random", "models.reward_b.load=random")
    names = [call.name for call in counted("recipe=hh_ppo_kl", ensemble, *loads).calls]
    assert names[1:3] == ["reward_a scores", "reward_b scores"]
    function = "algorithm.reward={name: function, function: tests.planning.pages:needs_text}"
    names = [call.name for call in counted("recipe=hh_ppo_kl", function).calls]
    assert names[:2] == ["rollout", "actor log-probs"]


def test_without_a_critic() -> None:
    """The group head reads the reward model's features: once for the labels, then in each of its
    updates (128 rows in minibatches of 32), and of the probe."""
    work = counted("recipe=tiny/rloo")
    assert work.built == ("actor", "reference", "reward")
    assert [(call.name, call.rows, call.count) for call in added_up(work.calls)] == [
        ("rollout", 128, 1),
        ("reward scores", 128, 1),
        ("actor log-probs", 128, 1),
        ("reference log-probs", 128, 1),
        ("reward features", 256, 5),
        ("actor update", 128, 4),
        ("group probe", 16, 1),
    ]


def test_groups_that_are_given_have_made_up_sources() -> None:
    given = "algorithm.group_classifier={name: labelled, groups: {easy: 0, hard: 1}}"
    assert counted("recipe=hh_gipo", given).calls == counted("recipe=ablation/oracle_groups").calls


@pytest.mark.parametrize(
    "words",
    [
        ("recipe=hh_sft",),
        ("recipe=hh_rm",),
        ("recipe=hh_dpo",),
        ("recipe=hh_dpo", "algorithm.precompute=false"),
        ("recipe=hh_gipo", "algorithm.epochs=3"),
        ("recipe=hh_ppo_kl",),
        ("recipe=tiny/grpo",),
        ("recipe=tiny/rloo", "algorithm.epochs=2"),
    ],
)
def test_the_pages_own_count_agrees(words: tuple[str, ...]) -> None:
    """A page counts per sequence of the batch."""
    recipe = compose(words, RECIPES)
    passes = Table(recipe).page().step(LATE).forward_equivalents
    found = count(recipe)
    assert forward_equivalents(found) == passes * found.calls[0].sequences


def test_pages_of_a_plugin() -> None:
    twice = counted("recipe=hh_sft", PLUGIN, "algorithm={name: test_twice}")
    assert brief(twice.calls) == [("update", "actor", 64, 64)] * 2
    assert forward_equivalents(twice) == 2 * 3 * 64


def test_a_page_that_needs_real_rows_has_no_plan() -> None:
    with pytest.raises(UserError, match="'test_reads_text' does not run on made-up rows: ValueErr"):
        counted("recipe=hh_ppo_kl", PLUGIN, "algorithm={name: test_reads_text}")


def test_a_run_has_the_same_table(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    mesh: Any = SimpleNamespace(data_parallel=SingleReplica())
    real = assembly.Providers(
        recipe, mesh, lambda name: nullcontext(), lambda *numbers: None, ExitStack()
    )
    assert set(real.runtime) == set(Table(recipe).runtime)


def test_no_random_number_is_drawn() -> None:
    recipe = compose(["recipe=hh_gipo"], RECIPES)

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate()]

    before = states()
    assert len(count(recipe).calls) == 15 and states() == before
