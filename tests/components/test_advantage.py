"""GAE and its whitening over replicas. The sums themselves are checked in tests/test_ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.roles import SingleReplica
from tests.torch_roles import run_replicas


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
    return rewards, values, torch.arange(6) < (1 + torch.arange(8) % 6)[:, None]


def test_returns_are_not_whitened() -> None:
    rewards, values, mask = inputs()
    white, returns = GeneralisedAdvantage(dp=SingleReplica()).estimate(rewards, values, mask)
    plain, same = GeneralisedAdvantage(whiten=False, dp=SingleReplica()).estimate(
        rewards, values, mask
    )
    assert torch.equal(returns, same)
    torch.testing.assert_close((plain + values)[mask], returns[mask])
    assert abs(float(white[mask].mean())) < 1e-6
    assert abs(float(white[mask].std(correction=0)) - 1) < 1e-6
    kept = plain[mask]
    torch.testing.assert_close(white[mask], (kept - kept.mean()) / kept.std(correction=0))


def test_whitening_is_global() -> None:
    rewards, values, mask = inputs()
    expected = GeneralisedAdvantage(dp=SingleReplica()).estimate(rewards, values, mask)[0]

    def work(dp: Any) -> Tensor:
        rows = slice(dp.rank, None, dp.size)
        return GeneralisedAdvantage(dp=dp).estimate(rewards[rows], values[rows], mask[rows])[0]

    for rank, part in enumerate(run_replicas(4, work)):
        torch.testing.assert_close(part, expected[rank::4])
