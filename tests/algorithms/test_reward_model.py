"""Bradley-Terry's loss by hand, and a reward model that learns its pairs."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from gipo_megatron.algorithms.reward_model import RewardModelling
from gipo_megatron.local.roles import TorchRewardModel
from gipo_megatron.types import Pairs, Sequences


def half(seed: int) -> Sequences:
    tokens = torch.randint(1, 9, (6, 4), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(4) >= 2).expand(6, 4)
    return Sequences(tokens, mask, torch.full((6,), 2), torch.full((6,), 4), torch.arange(6))


def pairs() -> Pairs:
    return Pairs(half(0), half(1), ("a",) * 6)


def modelling(centre: float = 0.0, lr: float = 3e-3) -> RewardModelling:
    reward = TorchRewardModel(9, hidden=16, lr=lr)
    return RewardModelling(
        centre=centre,
        reward=reward,
        pairs=lambda step: pairs(),
        timer=lambda name: contextlib.nullcontext(),
    )


def test_loss_by_hand() -> None:
    """Margins 2, -1, 0; -log sigmoid(m) = log(1 + e^-m)."""
    scores = torch.tensor([3.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    loss = modelling().loss(scores, pairs().block(0, 3))
    total, unit = loss.terms["preference"]
    assert unit == "pair"
    assert float(total) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (2, -1, 0)))
    assert loss.metrics["accuracy"].result() == pytest.approx(1 / 3)
    assert loss.metrics["margin"].result() == pytest.approx(1 / 3)
    assert set(loss.terms) == {"preference"}


def test_centring_by_hand() -> None:
    loss = modelling(centre=0.1).loss(torch.tensor([3.0, 0.0, 1.0, -1.0]), pairs().block(0, 2))
    total, unit = loss.terms["centre"]
    assert (float(total), unit) == (pytest.approx(0.1 * (16 + 1)), "pair")


def test_extreme_margins_are_finite() -> None:
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    total, _ = modelling().loss(scores, pairs().block(0, 1)).terms["preference"]
    total.backward()
    assert float(total.detach()) == pytest.approx(2e4)
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_pairs_are_learnt() -> None:
    algorithm = modelling(lr=0.03)
    rows = [algorithm.step(step).metrics for step in range(30)]
    assert rows[0].keys() == {"rm/loss", "rm/accuracy", "rm/margin", "rm/grad_norm"}
    assert rows[-1]["rm/accuracy"].result() == 1.0
    assert rows[-1]["rm/loss"].result() < 0.3 * rows[0]["rm/loss"].result()
