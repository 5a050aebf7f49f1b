"""Alerts: a metric that passed its threshold, with the number, the threshold and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gipo_megatron.screen import shown

BASELINE_STEPS = 10
# quiet steps in a row before an alert is raised again: a metric near its threshold gives one alert
CLEAR_STEPS = 5
# any other metric may be NaN for a reason (a correlation of constants)
ALWAYS_FINITE = ("loss", "grad_norm", "score_mean", "ratio_max", "step_seconds")


@dataclass
class Alerts:
    """The recipe's `alerts:` block. Each alert is raised once as it begins, and again only after
    CLEAR_STEPS quiet steps."""

    mass_min: float = 0.05  # groups/mass_min below this: the groups have collapsed
    # groups/response_split (an AUC) above this: the groups split responses, not prompts
    response_split: float = 0.8
    # reward/between_prompts above this: scores of different prompts are not comparable
    between_prompts: float = 0.5
    kl_above: float | None = 50.0  # kl/mean, nats per response; null: off
    # rollout/length_mean grew or shrank by this factor since the run's first steps
    length_drift: float = 2.0
    # share of responses that equal another one (1 - rollout/distinct), above this
    repetition: float = 0.5
    # rollout/logprob_gap_mean, nats per token, above this. Inference kernels in bf16 give 0.01 to
    # 0.03 (Qwen3 4B, Megatron and vLLM: 0.011, vime issue 64); 0.05 is a quarter of the default
    # clip range, before any update
    logprob_gap: float = 0.05
    # any infinity, or NaN in a loss, gradient norm, score, KL or held-out figure
    non_finite: bool = True

    raised: dict[str, int] = field(
        default_factory=dict, init=False, repr=False, metadata={"state": True}
    )
    lengths: list[float] = field(
        default_factory=list, init=False, repr=False, metadata={"state": True}
    )

    def check(self, values: Mapping[str, float], step: int) -> list[str]:
        """Return the alerts that begin with this step's values.

        A metric that is absent or NaN changes only `non_finite`.
        """
        begun = []
        for key, active, message in self._conditions(values):
            if active and key not in self.raised:
                # the names of sources are from the data
                begun.append(shown(f"step {step}: {message}"))
            if active:
                self.raised[key] = CLEAR_STEPS
            elif key in self.raised:
                self.raised[key] -= 1
                if not self.raised[key]:
                    del self.raised[key]
        return begun

    def state_dict(self) -> dict[str, Any]:
        return {"raised": dict(self.raised), "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raised, self.lengths = dict(state["raised"]), list(state["lengths"])

    def _conditions(self, values: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        """Yield (key, active, message) of each alert whose metric is in `values`."""
        if self.non_finite:
            bad = [f"{name} = {x}" for name, x in sorted(values.items()) if _is_bad(name, x)]
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            fix = "lower the learning rate, or look for broken rows in the step's samples"
            yield "non_finite", bool(bad), f"not finite: {', '.join(bad[:5])}{more}; {fix}"

        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if (mass := finite.get("groups/mass_min")) is not None:
            yield (
                "mass_min",
                mass < self.mass_min,
                f"groups/mass_min = {mass:.3g} < {self.mass_min:g}: a group has collapsed; lower"
                " group_classifier.lr, or use group_classifier.variance=mass",
            )
        if (auc := finite.get("groups/response_split")) is not None:
            yield (
                "response_split",
                auc > self.response_split,
                f"groups/response_split = {auc:.3g} > {self.response_split:g}: within a prompt the"
                " groups follow the response's score, not the prompt's difficulty; use"
                " group_classifier.input=prompt",
            )
        if (share := finite.get("reward/between_prompts")) is not None:
            yield (
                "between_prompts",
                share > self.between_prompts,
                f"reward/between_prompts = {share:.3g} > {self.between_prompts:g}: most of the"
                " score's variance lies between prompts, so groups follow the reward model's"
                " offsets; train it with centre above 0, or set reward.anchor=chosen",
            )
        if self.kl_above is not None and (kl := finite.get("kl/mean")) is not None:
            yield (
                "kl_above",
                kl > self.kl_above,
                f"kl/mean = {kl:.3g} > {self.kl_above:g} nats per response: the policy is leaving"
                " the reference; raise kl_controller.eta, lower models.actor.lr, or stop earlier",
            )
        if (gap := finite.get("rollout/logprob_gap_mean")) is not None:
            yield (
                "logprob_gap",
                gap > self.logprob_gap,
                f"rollout/logprob_gap_mean = {gap:.3g} > {self.logprob_gap:g} nats per token: the"
                " sampler's probabilities are not the trainer's; use the same dtype for both,"
                " top_k 0 and top_p 1, or set algorithm.rollout.correction=truncated",
            )
        if (length := finite.get("rollout/length_mean")) is not None:
            yield from self._length(length)
        for name in ("rollout/distinct", "rollout/repetition"):
            if (value := finite.get(name)) is not None:
                repeated = 1 - value if name == "rollout/distinct" else value
                yield (
                    name,
                    repeated > self.repetition,
                    f"{name} = {value:.3g}, repeated share {repeated:.3g} > {self.repetition:g}:"
                    " responses repeat themselves; read samples.jsonl, raise kl_controller.eta or"
                    " stop earlier",
                )

    def _length(self, length: float) -> Iterator[tuple[str, bool, str]]:
        if len(self.lengths) < BASELINE_STEPS:
            self.lengths.append(length)
            return
        start = sum(self.lengths) / len(self.lengths)
        yield (
            "length_drift",
            length > start * self.length_drift or length < start / self.length_drift,
            f"rollout/length_mean = {length:.4g}, was {start:.4g} over the first {BASELINE_STEPS}"
            f" steps, beyond the factor {self.length_drift:g}: look at groups/high_corr_length and"
            " samples.jsonl; if the reward model prefers long responses, penalise length",
        )


def _is_bad(name: str, value: float) -> bool:
    if name == "reward/non_finite":
        return value != 0
    if not math.isnan(value):
        return math.isinf(value)
    if name.startswith(("groups/", "source/")):
        return False
    if name.startswith("eval/"):
        return name.count("/") == 1  # a source may have no row
    return name == "kl/mean" or name.rsplit("/", 1)[-1] in ALWAYS_FINITE
