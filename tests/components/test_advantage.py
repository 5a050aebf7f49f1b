"""GAE and its whitening over replicas. The sums themselves are checked in tests/test_ops.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Rollout
from tests.small_ppo import rollout_of
from tests.torch_roles import replica_rows, run_replicas


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
