"""Statistics of the groups: M global sums a batch, which group is the high one, metrics."""

from __future__ import annotations

import math
from typing import Any

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.roles import DataParallel, SingleReplica, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Groups, Scores

EMA = 0.9
# a new high group leads by this many standard deviations of the batch for this many iterations
# (algorithm.md 5.5)
LEAD, PATIENCE = 0.1, 2


class GroupTracker:
    """Measure the groups of each batch, and keep an EMA of every group's mean raw score, the high
    group, and the last labels of the probe prompts."""

    def __init__(
        self, num_groups: int, variance: str = "mass", dp: DataParallel | None = None
    ) -> None:
        self.variance, self.dp = variance, dp or SingleReplica()
        self.means: list[float | None] = [None] * num_groups
        self.high = 0
        self.settled = False  # a group has led by LEAD; before that the best one is the high one
        self.challenger = 0
        self.led = 0  # iterations in a row that the challenger has led
        self.flips = 0
        self.probe: list[int] | None = None

    # ------------------------------------------------------------------------------------- measure

    def measure(self, probs: Tensor, scores: Scores) -> Groups:
        """Return labels, the M global sums and p_high of this batch; one all-reduce. Pure: the
        tracker does not change.

        probs: p_ig of this replica's rows, [B, M].
        """
        sums = self.dp.sum(ops.group_sums(probs, scores.standardised_scores))
        means, masses, mean_score, count = ops.group_means(sums)
        return Groups(
            probs=probs,
            high_prob=(probs * probs.new_tensor(self.ranks())).sum(1),
            sample_scores=scores.standardised_scores,
            group_means=means,
            masses=masses,
            mean_score=mean_score,
            count=count,
            high=self.high,
            std=scores.std,
            variance=self.variance,
        )

    def ranks(self) -> list[float]:
        """Return the normalised rank of each group, 0 lowest … 1 high; of one group: 1. Two groups:
        1 for the high one, 0 for the other."""
        others = [g for g in range(len(self.means)) if g != self.high]
        lowest_first = sorted(others, key=self._mean_then_index)
        top = len(self.means) - 1
        return [
            1.0 if g == self.high else lowest_first.index(g) / top for g in range(len(self.means))
        ]

    def _mean_then_index(self, group: int) -> tuple[float, int]:
        """Sort key: groups by mean score; the first of equals is the highest."""
        mean = self.means[group]
        return (-math.inf if mean is None else mean, -group)

    # ------------------------------------------------------------------------------------- observe

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        """Advance the means and the high group by one iteration; return the metrics of the groups.

        probe_logits: [b, M] of this replica's probe prompts; None where no head is learned.
        Group means are logged in raw score units. Global numbers are logged as a mean of one value.
        """
        metrics = group_metrics(groups)
        raw = scores.raw.double()
        moments = torch.stack([raw.sum(), raw.square().sum()])
        sums = self.dp.sum(torch.cat([(groups.probs.double() * raw[:, None]).sum(0), moments]))
        total, squares = (sums[-2:] / groups.count).tolist()
        std = math.sqrt(max(squares - total**2, 0.0))
        self.advance((sums[:-2] / groups.masses).tolist(), groups.masses.tolist(), std)
        if probe_logits is not None:
            labels = gather_rows(probe_logits.argmax(-1), self.dp).tolist()
            metrics["groups/flip_rate"] = Metric.mean(self.flip_rate([int(g) for g in labels]))
        metrics["groups/flips"] = Metric.mean(float(self.flips))
        return metrics

    def advance(self, scores: list[float], masses: list[float], std: float) -> None:
        """Update the means and the high group.

        scores [M]: p-weighted mean raw score; a group with less mass than one sequence, or without
        a finite score, is skipped. std: of the batch's raw scores.
        """
        for g, (score, mass) in enumerate(zip(scores, masses, strict=True)):
            if mass >= 1 and math.isfinite(score):
                old = self.means[g]
                self.means[g] = score if old is None else EMA * old + (1 - EMA) * score
        best = max(range(len(self.means)), key=self._mean_then_index)
        if not self.settled:
            self._settle(best, std)
            return
        current, leading = self.means[self.high], self.means[best]
        ahead = (
            best != self.high
            and leading is not None
            and (current is None or leading - current > LEAD * std)
        )
        self.led = (self.led + 1 if best == self.challenger else 1) if ahead else 0
        self.challenger = best
        if self.led >= PATIENCE:
            self.high, self.led, self.flips = best, 0, self.flips + 1

    def _settle(self, best: int, std: float) -> None:
        """Make the best group the high one, until it leads all others by LEAD: the index of a group
        has no meaning."""
        self.high = self.challenger = best
        others = [self.means[g] for g in range(len(self.means)) if g != best]
        known = [mean for mean in others if mean is not None]
        top = self.means[best]
        self.settled = top is not None and bool(known) and top - max(known) > LEAD * std

    def flip_rate(self, labels: list[int]) -> float:
        """Return the share of the probe's hard labels that changed since the last call; NaN the
        first time."""
        before, self.probe = self.probe, labels
        pairs = list(zip(before or [], labels, strict=False))
        return sum(a != b for a, b in pairs) / len(pairs) if pairs else math.nan

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        keys = ("means", "high", "settled", "challenger", "led", "flips", "probe")
        return {key: getattr(self, key) for key in keys} | {"means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises UserError for another number of groups."""
        if len(state["means"]) != len(self.means):
            raise UserError(
                f"the checkpoint has {len(state['means'])} groups, the recipe {len(self.means)}",
                where="group_classifier.num_groups",
                fix="resume with the number of groups the run began with",
            )
        vars(self).update(state, means=list(state["means"]))


def group_loss_coefficients(groups: Groups | None, like: Tensor) -> Tensor:
    """c_ig = N dR_var / dp_ig of the linear group loss (algorithm.md 2.2, stage 1), in the shape of
    `like`; zeros where no head learns. [B, M]"""
    if groups is None:
        return torch.zeros_like(like)
    c = ops.group_loss_coefficients(
        groups.sample_scores, groups.group_means, groups.masses, groups.count, groups.variance
    )
    return c.to(like.dtype)


def group_metrics(groups: Groups) -> Metrics:
    raw = (groups.group_means * groups.std).tolist()
    others = [r for g, r in enumerate(raw) if g != groups.high]
    entropy = torch.special.entr(groups.probs.double()).sum(1)
    variance = ops.group_variance(
        groups.group_means, groups.shares, groups.mean_score, groups.variance
    )
    metrics = {
        "groups/gap": Metric.mean(groups.gap * groups.std),
        "groups/gap_std": Metric.mean(groups.gap),
        "groups/variance": Metric.mean(variance),
        "groups/mass_min": Metric.mean(groups.shares.min()),
        "groups/label_entropy": Metric.mean(entropy),
        "groups/high_index": Metric.mean(float(groups.high)),
        "groups/return_high": Metric.mean(raw[groups.high]),
        "groups/return_low": Metric.mean(min(others, default=raw[groups.high])),
        "groups/return_worst": Metric.mean(min(raw)),
    }
    for g, (value, share) in enumerate(zip(raw, groups.shares.tolist(), strict=True)):
        metrics[f"groups/return_{g}"] = Metric.mean(value)
        metrics[f"groups/share_{g}"] = Metric.mean(share)
    return metrics
