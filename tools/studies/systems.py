"""The systems that are compared, and the formulas of their components for R runs at once.

The components are those of gipo_megatron/components: groups.py, tracker.py, variance.py and kl.py.
Two groups; rows [R, B] are the B samples of an iteration in R runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMA, LEAD, PATIENCE = 0.9, 0.1, 2
RAMP_START, RAMP_WIDTH, FLOOR, CEILING = 0.1, 0.2, 0.1, 3.0
MAX_WEIGHT = 3.0


@dataclass(frozen=True)
class System:
    """One column of the study. Without groups and weights it is PPO, with KL where eta is not 0."""

    label: str
    groups: str = "none"  # none | head | value | given | random
    weights: str = "none"  # none | group_variance | return_variance | group_dro
    beta: float = 0.3  # of group_variance; return_variance: its weight; group_dro: its step
    over_price: bool = True  # the KL coefficient is divided by the weight
    min_weight: float = 0.1
    entropy: float = 0.0  # weight of the head's label entropy
    adaptive: bool = False  # KL coefficient per group


SYSTEMS = {
    "ppo": System("PPO"),
    "ppo_kl": System("PPO with KL"),
    "gipo_shared": System(
        "GIPO, learned head, shared price", "head", "group_variance",
        over_price=False, min_weight=0.0,
    ),
    "gipo_head": System(
        "GIPO, learned head, price over weight", "head", "group_variance", entropy=0.03
    ),
    "gipo_value": System("GIPO, value split, price over weight", "value", "group_variance"),
    "adaptive": System("adaptive KL alone, value split", "value", adaptive=True),
    "gipo_both": System(
        "GIPO, value split, price over weight and adaptive KL", "value", "group_variance",
        adaptive=True,
    ),
    "oracle": System("given groups, price over weight", "given", "group_variance"),
    "random": System("random groups, price over weight", "random", "group_variance"),
    "return_variance": System("return variance, no groups", weights="return_variance", beta=0.1),
    "group_dro": System("GroupDRO, value split", "value", "group_dro", beta=0.1),
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Two groups of an iteration. probs [R, B, 2]; scores G [R, B]; means R_g and masses [R, 2];
    mean_score [R, 1]; high [R], index of the high group."""

    probs: Tensor
    scores: Tensor
    means: Tensor
    masses: Tensor
    mean_score: Tensor
    high: Tensor

    @property
    def too_small(self) -> Tensor:
        """Return [R, 1]: a group has less mass than one sample."""
        return (self.masses.amin(1) < 1)[:, None]

    def loss_coefficients(self) -> Tensor:
        """c_ig = G_i^2 - (G_i - R_g)^2   [R, B, 2]"""
        g = self.scores[..., None]
        return g.square() - (g - self.means[:, None]).square()


class Memory:
    """Everything of a system that lasts longer than an iteration, but networks and moments."""

    def __init__(self, system: System, runs: int, samples: int) -> None:
        self.system, self.samples = system, samples
        self.means = torch.full((runs, 2), torch.nan, dtype=torch.float64)  # EMA of raw scores
        self.leads = self.means.clone()  # EMA of R_g - R_all
        self.log_q = torch.zeros(runs, 2, dtype=torch.float64).log_softmax(1)
        self.high = torch.zeros(runs, dtype=torch.int64)
        self.settled = torch.zeros(runs, dtype=torch.bool)
        self.led = torch.zeros(runs, dtype=torch.int64)

    # ---------------------------------------------------------------------------------- the groups

    def labels(self, logits: Tensor | None, values: Tensor, ids: Tensor) -> Tensor:
        """Return p_ig [R, B, 2] from the head's logits [R, P, 2], where there is one, and V [R, P]
        of all prompts."""
        prompts = values.shape[1]
        if logits is not None:
            table = logits.softmax(-1)
        elif self.system.groups == "value":
            first = values > split_threshold(values, ids)
            table = torch.stack([first, ~first], -1).float()
        elif self.system.groups in ("given", "random"):
            order = torch.arange(prompts)
            if self.system.groups == "random":
                order = torch.randperm(prompts, generator=torch.Generator().manual_seed(30_000))
            first = (order < prompts // 2).expand(len(values), -1)
            table = torch.stack([first, ~first], -1).float()
        else:
            table = torch.full((*values.shape, 2), 0.5)
        return table.gather(1, ids[..., None].expand(-1, -1, 2))

    def measure(self, probs: Tensor, scores: Tensor) -> Groups:
        p = probs.double()
        masses = p.sum(1).clamp(min=1e-6 * self.samples)
        means = (p * scores[..., None]).sum(1) / masses
        return Groups(p, scores, means, masses, scores.mean(1, keepdim=True), self.high)

    # -------------------------------------------------------------------------- weights and prices

    def weights(self, groups: Groups) -> Tensor:
        """Return w_i [R, B]."""
        system = self.system
        if system.weights == "none":
            return torch.ones_like(groups.scores)
        if system.weights == "return_variance":
            raw = 1 - 2 * system.beta * (groups.scores - groups.mean_score)
            return raw.clamp(system.min_weight, MAX_WEIGHT)
        if system.weights == "group_variance":
            lead = groups.means - groups.mean_score
            lead = lead - (groups.masses / self.samples * lead).sum(1, keepdim=True)
            raw = 1 - 2 * system.beta * (groups.probs * lead[:, None]).sum(-1)
        else:
            q = self._updated_log_q(groups).exp() * self.samples / groups.masses
            raw = (groups.probs * q[:, None]).sum(-1)
        return torch.where(groups.too_small, 1.0, raw.clamp(system.min_weight, MAX_WEIGHT))

    def _updated_log_q(self, groups: Groups) -> Tensor:
        moved = (self.log_q - self.system.beta * groups.means).log_softmax(1)
        return torch.where(groups.too_small, self.log_q, moved)

    def relative_price(self, groups: Groups) -> Tensor:
        """Return the KL coefficient as a share of eta, [R, B] or [R, 1]."""
        if not self.system.adaptive:
            return torch.ones_like(groups.mean_score)
        lead = _of(self.leads, self.high) - _of(self.leads, 1 - self.high)
        strength = ((lead - RAMP_START) / RAMP_WIDTH).clamp(0, 1).nan_to_num(0.0)[:, None]
        high = groups.probs.gather(2, self.high[:, None, None].expand(-1, self.samples, 1))
        share = 1 - strength * (1 - high[..., 0])
        return with_mean_one(share / share.mean(1, keepdim=True), FLOOR, CEILING)

    # ------------------------------------------------------------------------------------- observe

    def observe(self, groups: Groups, raw: Tensor) -> None:
        """Advance everything by one iteration; raw scores [R, B]."""
        known = groups.masses >= 1
        found = (groups.probs * raw[..., None]).sum(1) / groups.masses
        self.means = _averaged(self.means, found, known)
        self.leads = _averaged(self.leads, groups.means - groups.mean_score, known)
        self.log_q = self._updated_log_q(groups)
        self._choose_high(raw.var(1, correction=0).sqrt())

    def _choose_high(self, std: Tensor) -> None:
        """Update the high group: before one leads by LEAD it is the best one, then a new one needs
        that lead PATIENCE times in a row."""
        ordered = self.means.nan_to_num(-torch.inf)
        best = ordered.argmax(1)
        lead = (ordered[:, 0] - ordered[:, 1]).abs() > LEAD * std
        ahead = self.settled & (best != self.high) & lead
        self.led = torch.where(ahead, self.led + 1, 0)
        moves = ~self.settled | (self.led >= PATIENCE)
        self.settled = self.settled | (lead & torch.isfinite(self.means).all(1))
        self.high = torch.where(moves, best, self.high)
        self.led = torch.where(moves, 0, self.led)


def _of(table: Tensor, index: Tensor) -> Tensor:
    """Return table [R, 2] at index [R]."""
    return table.gather(1, index[:, None])[:, 0]


def _averaged(old: Tensor, new: Tensor, known: Tensor) -> Tensor:
    """Return the EMA where `known`; the first known number starts it."""
    moved = torch.where(old.isnan(), new, EMA * old + (1 - EMA) * new)
    return torch.where(known, moved, old)


def split_threshold(values: Tensor, ids: Tensor) -> Tensor:
    """Return the threshold [R, 1] of V [R, P] that maximises rho_1 rho_2 (mean_1 - mean_2)^2 over
    the samples ids [R, B].   (Otsu 1979)"""
    order = values.argsort(1)
    mass = torch.zeros_like(values, dtype=torch.float64)
    mass = mass.scatter_add(1, ids, torch.ones(ids.shape, dtype=torch.float64)).gather(1, order)
    x = values.double().gather(1, order)
    below, total = mass.cumsum(1), (mass * x).cumsum(1)
    above = below[:, -1:] - below
    spread = total / below - (total[:, -1:] - total) / above
    between = (below * above * spread.square())[:, :-1].nan_to_num(0.0, posinf=0.0)
    return values.gather(1, order).gather(1, between.argmax(1, keepdim=True))


def with_mean_one(x: Tensor, low: float, high: float) -> Tensor:
    """Return the c [R, B] nearest to x with low <= c <= high and mean 1 in each row: clip(x + mu,
    low, high), mu by bisection."""
    left, right = low - x.amax(1, keepdim=True), high - x.amin(1, keepdim=True)
    for _ in range(45):
        middle = (left + right) / 2
        less = (x + middle).clamp(low, high).mean(1, keepdim=True) < 1
        left, right = torch.where(less, middle, left), torch.where(less, right, middle)
    return (x + right).clamp(low, high)
