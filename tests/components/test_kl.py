"""KL controllers against numbers worked out by hand."""

from __future__ import annotations

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
        torch.tensor(0.0),
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
    assert GroupAdaptiveKL(eta=0.1, dp=SingleReplica()).kl_coefficients(batch).tolist() == [
        0.1,
        0.1,
    ]
    assert after(0.1).kl_coefficients(batch).tolist() == [0.1, 0.1]
    assert after(-2.0).kl_coefficients(batch).tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("gap", "ramp"), [(0.1, 0.0), (0.15, 0.25), (0.2, 0.5), (0.3, 1.0), (2.0, 1.0)]
)
def test_ramp(gap: float, ramp: float) -> None:
    assert after(gap).ramp == pytest.approx(ramp)


def test_half_ramp_by_hand() -> None:
    """s = 0.5: p~ = 1 - 0.5 (1 - p) = 0.55, 0.95; their mean is 0.75."""
    batch = groups([0.1, 0.9])
    assert after(0.2, normalise=False).kl_coefficients(batch).tolist() == pytest.approx(
        [0.055, 0.095]
    )
    assert after(0.2).kl_coefficients(batch).tolist() == pytest.approx(
        [0.1 * 0.55 / 0.75, 0.1 * 0.95 / 0.75]
    )


def test_floor() -> None:
    batch = groups([0.0, 0.02, 1.0])
    assert after(1.0, normalise=False).kl_coefficients(batch).tolist() == pytest.approx(
        [0.01, 0.01, 0.1]
    )
    assert after(1.0, normalise=False, floor=0.5).kl_coefficients(batch).tolist() == pytest.approx(
        [0.05, 0.05, 0.1]
    )


def test_a_normalised_coefficient_keeps_the_budget() -> None:
    batch = groups([0.2, 0.5, 0.9, 0.7])
    assert float(after(1.0).kl_coefficients(batch).mean()) == pytest.approx(0.1)


def test_gap_is_an_exponential_mean_and_survives_a_checkpoint() -> None:
    controller = after(0.4)
    controller.observe(groups([0.5, 0.5], -0.6), 0.0)  # 0.9 * 0.4 + 0.1 * -0.6 = 0.3
    assert controller.ramp == pytest.approx(1.0)
    controller.observe(groups([0.5, 0.5], -0.7), 0.0)  # 0.2
    assert controller.ramp == pytest.approx(0.5)
    resumed = GroupAdaptiveKL(eta=0.1, dp=SingleReplica())
    resumed.load_state_dict(controller.state_dict())
    assert resumed.ramp == controller.ramp
