"""Values that a component refuses: the recipe check names the key and where it was written."""

from __future__ import annotations

import pytest

from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.problems import RecipeErrors
from tests.recipe.helpers import RECIPES

# (slot, component, key) -> values out of range
REFUSED: dict[tuple[str, str, str], list[str]] = {
    ("rollout", "sampling", "temperature"): ["0.0"],
    ("rollout", "sampling", "top_p"): ["0.0", "1.5"],
    ("rollout", "sampling", "top_k"): ["-1"],
    ("rollout", "sampling", "max_response"): ["-1"],
    ("rollout", "sampling", "correction"): ["sequence"],
    ("rollout", "sampling", "correction_cap"): ["0.5", "3.0"],  # 3: nothing reads it
    ("rollout", "vllm", "url"): [
        *("localhost:8000", "ftp://a", "'http://'"),
        *("'http://[a'", "'http://a:80x'", "'http://a:70000'"),
    ],
    ("rollout", "vllm", "transfer"): ["nccl"],
    ("rollout", "vllm", "timeout"): ["0.0"],
    ("reward", "model", "clip"): ["-1.0"],
    ("reward", "model", "anchor"): ["rejected"],
    ("reward", "ensemble", "combine"): ["median"],
    ("group_classifier", "critic_head", "num_groups"): ["0"],
    ("group_classifier", "critic_head", "input"): ["response"],
    ("group_classifier", "critic_head", "variance"): ["robust"],
    ("group_classifier", "critic_head", "init_std"): ["0.0"],
    ("group_classifier", "critic_head", "entropy"): ["-0.1"],
    ("group_classifier", "labelled", "variance"): ["robust"],
    ("group_classifier", "random", "num_groups"): ["1"],
    ("group_classifier", "random", "share"): ["0.0", "1.0", "1.5"],
    ("group_classifier", "random", "variance"): ["robust"],
    ("variance_regulariser", "group_variance", "beta"): ["-1.0"],
    ("variance_regulariser", "group_variance", "min_weight"): ["1.5", "0.0", "-1.0"],
    ("variance_regulariser", "group_variance", "max_weight"): ["0.5"],
    ("variance_regulariser", "group_variance", "labels"): ["hard"],
    ("variance_regulariser", "return_variance", "beta"): ["-1.0"],
    ("variance_regulariser", "return_variance", "max_weight"): ["0.5"],
    ("variance_regulariser", "group_dro", "step"): ["-1.0"],
    ("variance_regulariser", "cvar", "alpha"): ["0.0", "1.5"],
    ("kl_controller", "fixed", "eta"): ["-0.1", ".nan"],
    ("kl_controller", "adaptive", "eta"): ["-0.1"],
    ("kl_controller", "adaptive", "target"): ["0.0"],
    ("kl_controller", "adaptive", "horizon"): ["0"],
    ("kl_controller", "group_adaptive", "eta"): ["-0.1"],
    ("kl_controller", "group_adaptive", "floor"): ["-0.1", "1.1"],
    ("kl_controller", "group_adaptive", "ceiling"): ["0.9"],
    ("kl_controller", "group_adaptive", "target"): ["0.0"],
}


@pytest.mark.parametrize("case", REFUSED, ids="/".join)
def test_a_value_out_of_range_is_named(case: tuple[str, str, str]) -> None:
    slot, name, key = case
    members = "members: [reward_a, reward_b], " if name == "ensemble" else ""
    for value in REFUSED[case]:
        block = f"{{name: {name}, {members}{key}: {value}}}"
        with pytest.raises(RecipeErrors) as caught:
            compose(["recipe=tiny/gipo", f"algorithm.{slot}={block}"], RECIPES)
        found = [p for p in caught.value.problems if p.key == f"algorithm.{slot}.{key}"]
        assert len(found) == 1, str(caught.value)
        assert found[0].where
