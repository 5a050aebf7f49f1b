from __future__ import annotations

import dataclasses

import pytest

from gipo_megatron.registry import recipe_fields
from gipo_megatron.telemetry.alerts import BASELINE_STEPS, CLEAR_STEPS, Alerts

QUIET = {
    "groups/mass_min": 0.4,
    "groups/response_split": 0.5,
    "groups/auc": 0.99,  # against given labels: high is good
    "kl/mean": 3.0,
    "rollout/length_mean": 50.0,
    "rollout/distinct": 0.9,
    "policy/loss": 0.1,
    "groups/high_corr_score": float("nan"),  # undefined for equal scores: no alarm
    "eval/score/hh": float("nan"),  # a source without rows
}
LOUD = [
    ("groups/mass_min", 0.01, "0.05"),
    ("groups/response_split", 0.9, "0.8"),
    ("reward/between_prompts", 0.8, "0.5"),
    ("kl/mean", 80.0, "50"),
    ("rollout/distinct", 0.2, "0.5"),
    ("rollout/repetition", 0.7, "0.5"),
    ("rollout/logprob_gap_mean", 0.2, "0.05"),
    ("policy/loss", float("nan"), "finite"),
    ("value/loss", float("inf"), "finite"),
    ("source/hh/score", float("inf"), "finite"),
    ("eval/score", float("nan"), "finite"),
    ("eval/margin", float("nan"), "finite"),
    ("reward/non_finite", 2.0, "finite"),
]


@pytest.mark.parametrize(("metric", "value", "threshold"), LOUD)
def test_fires_once_names_everything_and_fires_again_only_after_clearing(
    metric: str, value: float, threshold: str
) -> None:
    alerts = Alerts()
    loud, clear = QUIET | {metric: value}, QUIET | ({} if metric in QUIET else {metric: 0.0})
    assert alerts.check(clear, 1) == []
    [message] = alerts.check(loud, 2)
    assert (
        message.startswith("step 2: ")
        and metric in message
        and f"{value:.3g}" in message
        and threshold in message
    )
    assert alerts.check(loud, 3) == []
    for step in range(4, 3 + CLEAR_STEPS):
        assert alerts.check(clear, step) == []
    assert alerts.check(loud, 8) == []  # one quiet step short: it only hovers
    for step in range(9, 9 + CLEAR_STEPS):
        assert alerts.check(clear, step) == []
    assert len(alerts.check(loud, 14)) == 1


def test_length_drifts_both_ways_from_the_first_steps() -> None:
    alerts = Alerts()
    for step in range(BASELINE_STEPS):
        assert alerts.check({"rollout/length_mean": 40.0 + step % 2}, step) == []
    assert alerts.check({"rollout/length_mean": 80.0}, 20) == []  # 80 < 2 * 40.5
    [longer] = alerts.check({"rollout/length_mean": 82.0}, 21)
    assert "82" in longer and "40.5" in longer
    for step in range(CLEAR_STEPS):
        assert alerts.check({"rollout/length_mean": 60.0}, 22 + step) == []
    assert len(alerts.check({"rollout/length_mean": 20.0}, 27)) == 1


def test_an_absent_metric_neither_raises_nor_clears() -> None:
    alerts = Alerts()
    assert len(alerts.check({"kl/mean": 99.0}, 1)) == 1
    assert alerts.check({"sft/loss": 1.0}, 2) == []
    assert alerts.check({"kl/mean": 99.0}, 3) == []


def test_switched_off() -> None:
    alerts = Alerts(kl_above=None, non_finite=False)
    assert alerts.check({"kl/mean": 1e9, "policy/loss": float("nan")}, 1) == []


def test_state_survives_a_checkpoint() -> None:
    first = Alerts()
    for step in range(BASELINE_STEPS):
        first.check({"rollout/length_mean": 40.0, "kl/mean": 99.0}, step)
    second = Alerts()
    second.load_state_dict(first.state_dict())
    # the length; KL was raised before
    assert len(second.check({"rollout/length_mean": 100.0, "kl/mean": 99.0}, 11)) == 1
    assert len(first.lengths) == BASELINE_STEPS


def test_state_is_no_recipe_key() -> None:
    keys = {f.name for f in recipe_fields(Alerts)}
    assert keys == {
        "mass_min",
        "response_split",
        "between_prompts",
        "kl_above",
        "length_drift",
        "repetition",
        "logprob_gap",
        "non_finite",
    }
    assert {f.name for f in dataclasses.fields(Alerts)} - keys == {"raised", "lengths"}
