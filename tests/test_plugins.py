"""Plugins from a recipe to a training step, on roles in plain torch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gipo_megatron import registry
from gipo_megatron.components.groups import CriticHead
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.local.roles import TorchActor
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Sequences
from tests.recipe.helpers import RECIPES
from tests.small_ppo import VOCAB, make_ppo


def test_a_kl_controller() -> None:
    words = ["recipe=tiny/gipo", "plugins=[tests.plugins.stepped_kl]"]
    block = "algorithm.kl_controller={name: stepped, eta: 0.2}"
    recipe = compose([*words, block], RECIPES)
    assert recipe.algorithm["kl_controller"] == {"name": "stepped", "eta": 0.2, "iterations": 2}
    controller = registry.build("kl_controller", recipe.algorithm["kl_controller"], {})
    ppo = make_ppo(SingleReplica(), CriticHead(), GroupVariance(), controller)
    coefficients, seen = [], []
    for step in range(3):
        metrics = ppo.step(step).metrics
        coefficients.append(metrics["kl/coef_mean"].result())
        seen.append(metrics["kl/iterations"].result())
    assert coefficients == pytest.approx([0.2, 0.2, 0.02])
    assert seen == [1, 2, 3]
    assert ppo.state_dict()["kl_controller"] == {"seen": 3}

    with pytest.raises(RecipeErrors, match="at least 0") as caught:
        compose([*words, "algorithm.kl_controller={name: stepped, eta: -1.0}"], RECIPES)
    assert [p.key for p in caught.value.problems] == ["algorithm.kl_controller.eta"]


def test_an_algorithm_with_a_field_that_may_be_none(tmp_path: Path) -> None:
    (tmp_path / "focal.yaml").write_text(
        "defaults: [tiny/sft]\n"
        "plugins: [tests.plugins.focal_sft]\n"
        "algorithm: {name: focal_sft, focus: 2.0}\n"
        "run: {dir: runs/focal}\n"
    )
    recipe = compose([f"recipe={tmp_path / 'focal.yaml'}"], RECIPES)
    assert recipe.algorithm == {"name": "focal_sft", "focus": 2.0}
    assert (recipe.trained, tuple(recipe.models)) == (("actor",), ("actor",))

    tokens = 1 + torch.arange(24).reshape(4, 6) % (VOCAB - 1)
    lengths = torch.full((4,), 6)
    mask = (torch.arange(6) > 1).expand(4, 6)
    rows = Sequences(tokens, mask, torch.full((4,), 2), lengths, torch.arange(4))
    runtime: dict[str, Any] = {
        "actor": TorchActor(VOCAB, hidden=16, lr=0.02),
        "examples": lambda step: rows,
        "held_out": None,
        "timer": lambda name: nullcontext(),
    }
    page = registry.build("algorithm", recipe.algorithm, runtime)
    losses = [page.step(step).metrics["focal/loss"].result() for step in range(20)]
    # a uniform policy: (1 - 1/12)^2 log 12
    assert losses[0] == pytest.approx((1 - 1 / VOCAB) ** 2 * torch.tensor(float(VOCAB)).log())
    assert losses[-1] < 0.5 * losses[0]
