"""The nouns, with shapes.

B sequences on this data parallel replica, T tokens (prompt + response, contiguous, right-padded), M
groups. Position t of any [B, T] tensor is about token t: logprobs[b, t] = log p(token_t |
tokens_<t); values[b, t] is the value of the state in which token t was chosen; both are zero
outside the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------- rows of a batch


class Rows:
    """A frozen dataclass whose tensor and tuple fields all have one entry per row (a sequence, or a
    pair)."""

    def _map(self, tensor: Callable[[Tensor], Tensor], row: Callable[[tuple], tuple]) -> Self:
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = tensor(value)
            elif isinstance(value, tuple):
                changed[f.name] = row(value)
            elif isinstance(value, Rows):
                changed[f.name] = value._map(tensor, row)
        return replace(self, **changed)  # type: ignore[type-var]

    def select(self, index: Tensor) -> Self:
        """The rows at `index` (int64 [K]), in that order."""
        picked = index.tolist()
        return self._map(lambda x: x[index.to(x.device)], lambda x: tuple(x[i] for i in picked))

    def block(self, start: int, stop: int) -> Self:
        """Rows start … stop - 1."""
        return self._map(lambda x: x[start:stop], lambda x: x[start:stop])

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda x: x.to(device), lambda x: x)

    def __len__(self) -> int:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, (Tensor, tuple, Rows)):
                return len(value)
        raise AssertionError("a batch without rows")

    @property
    def sequences(self) -> Sequences:
        """What a model reads: all sequences of these rows (a pair has two, all chosen before all
        rejected)."""
        raise NotImplementedError

    @property
    def row_ids(self) -> Tensor:
        """int64 [B], named in messages about these rows."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """How many of each loss unit these rows hold: {token, sequence, pair}; tokens are those
        inside the mask."""
        sequences = self.sequences
        return {"token": int(sequences.mask.sum()), "sequence": len(sequences), "pair": len(self)}


@dataclass(frozen=True)
class Sequences(Rows):
    """Token sequences; `mask` marks the tokens a loss or a reward is about (the response)."""

    tokens: Tensor  # int64 [B, T], right-padded
    mask: Tensor  # bool [B, T]
    prompt_lengths: Tensor  # int64 [B]; positions < this are prompt
    lengths: Tensor  # int64 [B]; positions < this are real tokens
    ids: Tensor  # int64 [B]; the dataset's row numbers

    @property
    def sequences(self) -> Sequences:
        return self

    @property
    def row_ids(self) -> Tensor:
        return self.ids


@dataclass(frozen=True)
class Pairs(Rows):
    """Preference pairs; both halves have the same [B, T]. One row is one pair, never split over
    micro-batches."""

    chosen: Sequences
    rejected: Sequences
    source: tuple[str, ...]

    @property
    def sequences(self) -> Sequences:
        parts = {
            f.name: torch.cat([getattr(self.chosen, f.name), getattr(self.rejected, f.name)])
            for f in fields(Sequences)
        }
        return Sequences(**parts)

    @property
    def row_ids(self) -> Tensor:
        return self.chosen.ids


@dataclass(frozen=True)
class Prompts(Rows):
    """Prompts to respond to; with several responses a prompt, the prompt's row is repeated."""

    tokens: Tensor  # int64 [B, P], right-padded
    lengths: Tensor  # int64 [B]
    prompt_id: Tensor  # int64 [B], the dataset's row number
    # int64 [B], unique over the whole run: step * sequences per step + global row
    sample_id: Tensor
    source: tuple[str, ...]
    # whatever else the data knows of the row (planted: its gold answer, …)
    extras: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Rollout(Rows):
    """Prompts with their responses. The end-of-text token, when produced, is part of the
    response."""

    tokens: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T], response tokens
    prompt_lengths: Tensor  # int64 [B]
    finished: Tensor  # bool [B], ended by end-of-text (not truncated)
    generation_logprobs: Tensor | None  # [B, T] as the sampler saw them
    response_text: tuple[str, ...]
    prompt_id: Tensor
    sample_id: Tensor
    source: tuple[str, ...]
    extras: tuple[dict[str, Any], ...]

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.tokens, self.mask, self.prompt_lengths, self.lengths, self.sample_id)

    @property
    def row_ids(self) -> Tensor:
        return self.sample_id

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B]"""
        return self.mask.sum(1)

    @property
    def lengths(self) -> Tensor:
        """int64 [B], prompt + response"""
        return self.prompt_lengths + self.response_lengths


@dataclass(frozen=True)
class Experience(Rows):
    """All that one PPO iteration knows of its rollout; every quantity is computed once, from those
    above it."""

    rollout: Rollout
    logprobs: Tensor  # [B, T] of the behaviour policy, by the training forward
    values: Tensor  # [B, T] before the update
    advantages: Tensor  # [B, T], whitened over the global batch, not yet weighted
    returns: Tensor  # [B, T], targets of the critic
    weights: Tensor  # [B], w_i of the variance regulariser
    group_probs: Tensor  # [B, M]
    group_coefficients: Tensor  # [B, M], c_ig = N dR_var/dp_ig; zeros when nothing is learned

    @property
    def sequences(self) -> Sequences:
        return self.rollout.sequences

    @property
    def row_ids(self) -> Tensor:
        return self.rollout.sample_id


# -------------------------------------------------------------------------------- scores and groups


@dataclass(frozen=True)
class Scores(Rows):
    """One score per response, in the three forms that are needed."""

    raw: Tensor  # [B], the reward model's units, after ensemble and penalties
    shaped: Tensor  # [B], normalised and clipped: PPO's reward on the last token
    # [B], G_i = clip((raw - batch mean) / running std, +-3); no KL in it (algorithm.md 3)
    returns: Tensor
    parts: dict[str, Tensor]  # named pieces of raw ([B] each), for logging
    std: float  # running std of raw; G_i and R_g times this are in raw units

    def __len__(self) -> int:
        return len(self.raw)


@dataclass(frozen=True)
class Groups:
    """Soft group labels of this replica's rows, and the M global sums everything else follows
    from."""

    probs: Tensor  # [B, M]
    high_prob: Tensor  # [B], p(g_high); for M > 2 the expected normalised rank of the group
    sample_returns: Tensor  # [B], G_i
    returns: Tensor  # [M], R_g, global
    masses: Tensor  # [M], m_g = sum_i p_ig, global
    mean_return: Tensor  # scalar, R_all, global
    count: int  # N, sequences in the global batch
    high: int  # g_high of the iteration before
    std: float  # raw score units per unit of G
    variance: str = "mass"  # mass | uniform: what R_var is, for both stages
    observed: Groups | None = None  # what a head learns beside given labels: measured, never used

    @property
    def shares(self) -> Tensor:
        """rho_g = m_g / N, [M]"""
        return self.masses / self.count

    @property
    def gap(self) -> Tensor:
        """R_high - the lowest other R_g, in units of G; 0 for one group."""
        others = [r for g, r in enumerate(self.returns) if g != self.high]
        return (
            self.returns[self.high] - torch.stack(others).min()
            if others
            else torch.zeros_like(self.returns[0])
        )


@dataclass(frozen=True)
class Weights:
    """One weight per trajectory, before and after clamping."""

    raw: Tensor  # [B]; mean 1 over the global batch
    values: Tensor  # [B]


# ------------------------------------------------------------------------------- losses and metrics


@dataclass(frozen=True)
class TokenStats:
    """What an actor or a reference says of each token."""

    logprobs: Tensor  # [b, T]
    entropy: Tensor | None  # [b, T], of the distribution the token was drawn from, nats


@dataclass(frozen=True)
class CriticOutput:
    values: Tensor  # [b, T]
    group_logits: Tensor | None  # [b, M]


@dataclass(frozen=True)
class Metric:
    """A reduction: sufficient statistics that add (or take the extreme) over micro-batches,
    minibatches and ranks."""

    kind: str  # sum | mean | std | correlation | explained_variance | min | max
    parts: Tensor  # float64 [k]

    @staticmethod
    def sum(values: Tensor | float) -> Metric:
        return Metric("sum", torch.as_tensor(values).detach().double().sum().reshape(1))

    @staticmethod
    def mean(values: Tensor | float, weights: Tensor | None = None) -> Metric:
        """sum(w x) / sum(w); w = 1 when not given. NaN when the weights sum to zero."""
        x = torch.as_tensor(values).detach().double()
        w = torch.ones_like(x) if weights is None else weights.detach().double().expand_as(x)
        return Metric("mean", torch.stack([torch.where(w != 0, w * x, 0.0).sum(), w.sum()]))

    @staticmethod
    def std(values: Tensor) -> Metric:
        """Population standard deviation."""
        x = values.detach().double().flatten()
        return Metric("std", torch.stack([torch.ones_like(x).sum(), x.sum(), x.square().sum()]))

    @staticmethod
    def _paired(kind: str, x: Tensor, y: Tensor) -> Metric:
        x, y = x.detach().double().flatten(), y.detach().double().flatten()
        return Metric(
            kind,
            torch.stack(
                [
                    torch.ones_like(x).sum(),
                    x.sum(),
                    y.sum(),
                    x.square().sum(),
                    y.square().sum(),
                    (x * y).sum(),
                ]
            ),
        )

    @staticmethod
    def correlation(x: Tensor, y: Tensor) -> Metric:
        """Pearson's r."""
        return Metric._paired("correlation", x, y)

    @staticmethod
    def explained_variance(target: Tensor, prediction: Tensor) -> Metric:
        """1 - Var(target - prediction) / Var(target)"""
        return Metric._paired("explained_variance", target, target.double() - prediction.double())

    @staticmethod
    def min(values: Tensor) -> Metric:
        return Metric("min", values.detach().double().min().reshape(1))

    @staticmethod
    def max(values: Tensor) -> Metric:
        return Metric("max", values.detach().double().max().reshape(1))

    def merge(self, other: Metric) -> Metric:
        assert self.kind == other.kind, f"{self.kind} merged with {other.kind}"
        if self.kind in ("min", "max"):
            return Metric(self.kind, getattr(torch, f"{self.kind}imum")(self.parts, other.parts))
        return Metric(self.kind, self.parts + other.parts)

    def result(self) -> float:
        """The number to show; NaN where it is not defined (nothing counted, no variance)."""
        p = self.parts.tolist()
        if self.kind in ("sum", "min", "max"):
            return p[0]
        if self.kind == "mean":
            return p[0] / p[1] if p[1] else float("nan")
        n = p[0]
        if not n:
            return float("nan")
        if self.kind == "std":
            return max(p[2] / n - (p[1] / n) ** 2, 0.0) ** 0.5
        var_x, var_y = p[3] / n - (p[1] / n) ** 2, p[4] / n - (p[2] / n) ** 2
        if var_x <= 1e-12 * max(p[3] / n, 1e-300):  # rounding of a constant
            return float("nan")
        if self.kind == "explained_variance":
            return 1 - var_y / var_x
        if var_y <= 1e-12 * max(p[4] / n, 1e-300):
            return float("nan")
        return (p[5] / n - p[1] * p[2] / n**2) / (var_x * var_y) ** 0.5


Metrics = dict[str, Metric]


def merge_metrics(into: Metrics, new: Metrics) -> Metrics:
    """Both, names that stand in both merged."""
    return {**into, **{name: into[name].merge(m) if name in into else m for name, m in new.items()}}


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """`loss` becomes `prefix/loss`; a name that has a slash already stays."""
    return {name if "/" in name else f"{prefix}/{name}": metric for name, metric in metrics.items()}


@dataclass(frozen=True)
class Loss:
    """Terms {name: (sum over units, unit)}, unit = token | sequence | pair. Each term is divided
    once, by the global count of its unit."""

    terms: dict[str, tuple[Tensor, str]]
    metrics: Metrics = field(default_factory=dict)


Output = TokenStats | CriticOutput | Tensor  # Tensor: scores [b] of a reward model
BatchLoss = Callable[[Any, Any], Loss]  # (Output, Rows) -> Loss


@dataclass(frozen=True)
class Update:
    """Outcome of one optimizer step."""

    metrics: Metrics  # the loss's own, plus grad_norm and learning_rate
    # row ids behind a non-finite loss or gradient; the step was not taken
    skipped: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StepResult:
    """Outcome of one iteration of an algorithm."""

    metrics: Metrics
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows for samples.jsonl
    skipped: dict[str, tuple[int, ...]] = field(default_factory=dict)  # role -> row ids
    tokens: int = 0  # prompt + response tokens of this replica's rows
    # forward passes over those tokens that the step's work is worth; a training pass is worth three
    passes: int = 0
