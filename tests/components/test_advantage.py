"""GAE and its whitening over replicas (the sums are checked in tests/test_ops.py); baselines from
the other responses to a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gipo_megatron.components.advantage import (
    GeneralisedAdvantage,
    GroupNormalised,
    LeaveOneOut,
)
from gipo_megatron.local.replicas import replica_rows, run_replicas
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Rollout
from tests.small_ppo import rollout_of


def inputs() -> tuple[Tensor, Tensor, Rollout]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
    mask = torch.arange(6) < (1 + torch.arange(8) % 6)[:, None]
    return rewards, values, replace(rollout_of(["a"] * 8), mask=mask)


def test_returns_are_not_whitened() -> None:
    rewards, values, rollout = inputs()
    white, returns = GeneralisedAdvantage(dp=SingleReplica()).estimate(rewards, values, rollout)
    plain, same = GeneralisedAdvantage(whiten=False, dp=SingleReplica()).estimate(
        rewards, values, rollout
    )
    mask = rollout.mask
    assert torch.equal(returns, same)
    torch.testing.assert_close((plain + values)[mask], returns[mask])
    assert abs(float(white[mask].mean())) < 1e-6
    assert abs(float(white[mask].std(correction=0)) - 1) < 1e-6
    kept = plain[mask]
    torch.testing.assert_close(white[mask], (kept - kept.mean()) / kept.std(correction=0))


def test_whitening_is_global() -> None:
    rewards, values, rollout = inputs()
    expected = GeneralisedAdvantage(dp=SingleReplica()).estimate(rewards, values, rollout)[0]

    def work(dp: Any) -> Tensor:
        rows = slice(dp.rank, None, dp.size)
        mine = replica_rows(rollout, dp)
        return GeneralisedAdvantage(dp=dp).estimate(rewards[rows], values[rows], mine)[0]

    for rank, part in enumerate(run_replicas(4, work)):
        torch.testing.assert_close(part, expected[rank::4])


# -------------------------------------------------------------------------------- RLOO and GRPO


def responses() -> tuple[Tensor, Rollout]:
    """Twelve responses, dealt out of order: four to each of three prompts; two tokens each."""
    rollout = rollout_of(["a"] * 12, [7, 3, 9, 3, 7, 9, 9, 3, 7, 3, 7, 9])
    rewards = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return rewards, rollout


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_baselines_against_loops(name: str) -> None:
    rewards, rollout = responses()
    component = {"rloo": LeaveOneOut, "grpo": GroupNormalised}[name](dp=SingleReplica())
    advantages, targets = component.estimate(rewards, None, rollout)
    total = [float(rewards[i, 1] + rewards[i, 2]) for i in range(12)]  # token 0 is the prompt
    prompt = rollout.prompt_id.tolist()
    for i in range(12):
        others = [total[j] for j in range(12) if prompt[j] == prompt[i] and j != i]
        assert len(others) == 3
        if name == "rloo":
            expected = total[i] - sum(others) / 3
        else:
            group = np.array([*others, total[i]])
            expected = (total[i] - group.mean()) / (group.std(ddof=1) + 1e-4)
        assert advantages[i].tolist() == pytest.approx([0, expected, expected], abs=1e-5)
        to_go = [0, total[i], float(rewards[i, 2])]
        assert targets[i].tolist() == pytest.approx(to_go, abs=1e-6)


@pytest.mark.parametrize("make", [LeaveOneOut, GroupNormalised])
@pytest.mark.parametrize("size", [2, 4])
def test_baselines_are_global(make: Any, size: int) -> None:
    rewards, rollout = responses()
    expected, _ = make(dp=SingleReplica()).estimate(rewards, None, rollout)

    def work(dp: Any) -> Tensor:
        mine = replica_rows(rollout, dp)
        return make(dp=dp).estimate(rewards[dp.rank :: dp.size], None, mine)[0]

    for rank, part in enumerate(run_replicas(size, work)):
        assert torch.equal(part, expected[rank::size])
