"""KL controllers against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gipo_megatron.components.kl import AdaptiveKL, FixedKL, GroupAdaptiveKL, NoKL
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Groups


def groups(high: list[float], gap: float = 0.0) -> Groups:
    p = torch.tensor(high, dtype=torch.float64)
    returns = torch.tensor([gap, 0.0], dtype=torch.float64)
    return Groups(
        torch.stack([p, 1 - p], 1),
        p,
        torch.zeros_like(p),
        returns,
        torch.tensor([2.0, 2.0]),
        returns.mean(),
        len(high),
        0,
        1.0,
    )


def test_none_and_fixed() -> None:
    assert NoKL().kl_coefficients(groups([0.1, 0.9])).tolist() == [0.0, 0.0]
    assert FixedKL(eta=0.07).kl_coefficients(groups([0.1, 0.9])).tolist() == [0.07, 0.07]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.1 * (1 + 0.2 * 4 / 100)),
        (6.6, 0.1 * (1 + 0.1 * 4 / 100)),
        (0.0, 0.1 * (1 - 0.2 * 4 / 100)),
    ],
)
def test_zieglers_rule(kl: float, expected: float) -> None:
    controller = AdaptiveKL(eta=0.1, target=6.0, horizon=100)
    batch = groups([0.5] * 4)
    assert controller.kl_coefficients(batch).tolist() == [0.1] * 4
    controller.observe(batch, kl)
    assert controller.kl_coefficients(batch).tolist() == pytest.approx([expected] * 4)
    resumed = AdaptiveKL(eta=0.1, target=6.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    assert torch.equal(resumed.kl_coefficients(batch), controller.kl_coefficients(batch))


def after(gap: float, **settings: float | bool) -> GroupAdaptiveKL:
    controller = GroupAdaptiveKL(eta=0.1, dp=SingleReplica(), **settings)  # type: ignore[arg-type]
    controller.observe(groups([0.5, 0.5], gap), 0.0)
    return controller


def test_all_coefficients_are_eta_until_there_is_a_gap() -> None:
    batch = groups([0.1, 0.9])
    fresh = GroupAdaptiveKL(eta=0.1, dp=SingleReplica())
    assert fresh.kl_coefficients(batch).tolist() == [0.1, 0.1]
    assert after(0.1).kl_coefficients(batch).tolist() == [0.1, 0.1]
    assert after(-2.0).kl_coefficients(batch).tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("gap", "ramp"), [(0.1, 0.0), (0.15, 0.25), (0.2, 0.5), (0.3, 1.0), (2.0, 1.0)]
)
def test_ramp(gap: float, ramp: float) -> None:
    assert after(gap).strength(0) == pytest.approx(ramp)
    assert after(gap).strength(1) == 0
    assert after(gap, ramp=False).strength(0) == 1


def test_half_ramp_by_hand() -> None:
    """s = 0.5: p~ = 1 - 0.5 (1 - p) = 0.55, 0.95; their mean is 0.75."""
    batch = groups([0.1, 0.9])
    assert after(0.2, normalise=False).kl_coefficients(batch).tolist() == pytest.approx(
        [0.055, 0.095]
    )
    assert after(0.2).kl_coefficients(batch).tolist() == pytest.approx(
        [0.1 * 0.55 / 0.75, 0.1 * 0.95 / 0.75]
    )


def test_floor_and_ceiling() -> None:
    batch = groups([0.0, 0.02, 1.0])
    assert after(1.0, normalise=False).kl_coefficients(batch).tolist() == pytest.approx(
        [0.01, 0.01, 0.1]
    )
    assert after(1.0, normalise=False, floor=0.5).kl_coefficients(batch).tolist() == pytest.approx(
        [0.05, 0.05, 0.1]
    )
    # p~ / mean p~ = 0, 0, 0, 4: the excess over the ceiling goes to the others
    batch = groups([0.0, 0.0, 0.0, 1.0])
    assert after(1.0, ceiling=2.5).kl_coefficients(batch).tolist() == pytest.approx(
        [0.05, 0.05, 0.05, 0.25]
    )


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05, 0.01])
@pytest.mark.parametrize(("floor", "ceiling"), [(0.1, 3.0), (0.0, 1.5), (0.9, 1.1)])
def test_the_mean_coefficient_is_eta(share: float, floor: float, ceiling: float) -> None:
    """Hard labels, with a high group of any size, and soft ones."""
    high = [1.0] * int(share * 100) + [0.0] * (100 - int(share * 100))
    soft = torch.rand(100, generator=torch.Generator().manual_seed(0)).pow(4).tolist()
    for p in (high, soft):
        found = after(1.0, floor=floor, ceiling=ceiling).kl_coefficients(groups(p))
        assert float(found.mean()) == pytest.approx(0.1, abs=1e-9)
        assert float(found.min()) >= 0.1 * floor - 1e-12
        assert float(found.max()) <= 0.1 * ceiling + 1e-12


def test_gap_is_an_exponential_mean_and_survives_a_checkpoint() -> None:
    controller = after(0.4)
    controller.observe(groups([0.5, 0.5], -0.6), 0.0)  # 0.9 * 0.4 + 0.1 * -0.6 = 0.3
    assert controller.strength(0) == pytest.approx(1.0)
    controller.observe(groups([0.5, 0.5], -0.7), 0.0)  # 0.2
    assert controller.strength(0) == pytest.approx(0.5)
    resumed = GroupAdaptiveKL(eta=0.1, dp=SingleReplica())
    resumed.load_state_dict(controller.state_dict())
    assert resumed.gap(0) == controller.gap(0) == pytest.approx(0.2)


def test_the_gap_does_not_depend_on_the_index_of_the_high_group() -> None:
    """A group that leads from the first iteration on, as group 1: no memory of the time before it
    became the high one holds the ramp at 0."""
    controller = GroupAdaptiveKL(eta=0.1, dp=SingleReplica())
    for _ in range(3):
        controller.observe(groups([0.5, 0.5], -0.8), 0.0)  # group 0 is taken for the high one
    assert controller.strength(0) == 0
    assert controller.strength(1) == 1


@pytest.mark.parametrize("controller", [GroupAdaptiveKL(eta=0.1, target=6.0), AdaptiveKL(eta=0.1)])
def test_a_number_that_is_none_is_not_remembered(controller: GroupAdaptiveKL | AdaptiveKL) -> None:
    controller.dp = SingleReplica()  # type: ignore[union-attr]
    batch = groups([0.1, 0.9], 1.0)
    broken = replace(batch, group_means=torch.tensor([math.nan, 0.0], dtype=torch.float64))
    controller.observe(batch, 6.0)
    before = controller.state_dict()
    controller.observe(broken, math.nan)
    assert controller.state_dict() == before
    assert controller.kl_coefficients(batch).isfinite().all()


def test_a_group_below_one_sequence_has_no_lead() -> None:
    controller = GroupAdaptiveKL(eta=0.1, dp=SingleReplica())
    controller.observe(replace(groups([0.5] * 4, 1.0), masses=torch.tensor([0.4, 3.6])), 0.0)
    assert controller.gap(0) == 0


def test_eta_is_steered_to_a_target() -> None:
    """Twice the target: 20 % up over `horizon` sequences."""
    controller = GroupAdaptiveKL(eta=0.1, target=6.0, horizon=100, dp=SingleReplica())
    batch = groups([0.1, 0.9, 0.4, 0.6], 1.0)
    controller.observe(batch, 12.0)
    assert float(controller.kl_coefficients(batch).mean()) == pytest.approx(0.1 * (1 + 0.2 * 0.04))
    resumed = GroupAdaptiveKL(eta=0.1, target=6.0, horizon=100, dp=SingleReplica())
    resumed.load_state_dict(controller.state_dict())
    assert torch.equal(resumed.kl_coefficients(batch), controller.kl_coefficients(batch))
