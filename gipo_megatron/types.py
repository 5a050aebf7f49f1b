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

from gipo_megatron.metrics import Metrics, merge_metrics
from gipo_megatron.tensors import Tensor, torch

# ---------------------------------------------------------------------------------- rows of a batch


class Rows:
    """A frozen dataclass whose tensor and tuple fields have one entry per row (a sequence, or a
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
        """All sequences of these rows (a pair has two, all chosen before all rejected)."""
        raise NotImplementedError

    @property
    def row_ids(self) -> Tensor:
        """int64 [B], named in messages about these rows."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """Return the number of each loss unit in these rows: {token, sequence, pair}; tokens are
        those inside the mask."""
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
    # further fields of the data's row (planted: its gold answer, …)
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
    """One PPO iteration's rollout and all that its losses read; every quantity is computed once."""

    rollout: Rollout
    logprobs: Tensor  # [B, T] of the behaviour policy, by the training forward
    values: Tensor | None  # [B, T] before the update; None without a critic
    # [B, T], whitened over the global batch, times the sampler's token weights, not yet times w_i
    advantages: Tensor
    returns: Tensor  # [B, T], targets of the critic
    weights: Tensor  # [B], w_i of the variance regulariser
    group_probs: Tensor  # [B, M]
    group_loss_coefficients: Tensor  # [B, M], c_ig = N dR_var/dp_ig; zeros where no head learns

    @property
    def sequences(self) -> Sequences:
        return self.rollout.sequences

    @property
    def row_ids(self) -> Tensor:
        return self.rollout.sample_id


# -------------------------------------------------------------------------------- scores and groups


@dataclass(frozen=True)
class Scores(Rows):
    """One score per response, in three forms."""

    raw: Tensor  # [B], the reward model's units, after ensemble, length penalty and anchor
    shaped: Tensor  # [B], normalised and clipped: PPO's reward on the last token
    # [B], G_i = clip((raw - batch mean) / running std, +-3); no KL in it (algorithm.md 3)
    standardised_scores: Tensor
    parts: dict[str, Tensor]  # named pieces of the scores ([B] each), for logging
    std: float  # running std of raw; G_i and R_g times this are in raw units

    def __len__(self) -> int:
        return len(self.raw)


@dataclass(frozen=True)
class Groups:
    """Soft group labels of this replica's rows, and the M global sums."""

    probs: Tensor  # [B, M]
    high_prob: Tensor  # [B], p(g_high); for M > 2 the expected normalised rank of the group
    sample_scores: Tensor  # [B], G_i
    group_means: Tensor  # [M], R_g, global
    masses: Tensor  # [M], m_g = sum_i p_ig, global
    mean_score: Tensor  # scalar, R_all, global
    count: int  # N, sequences in the global batch
    high: int  # g_high of the iteration before
    std: float  # raw score units per unit of G
    variance: str = "mass"  # mass | uniform: the definition of R_var, for both stages

    @property
    def shares(self) -> Tensor:
        """rho_g = m_g / N, [M]"""
        return self.masses / self.count

    @property
    def gap(self) -> Tensor:
        """R_high - the lowest other R_g, in units of G; 0 for one group."""
        others = [r for g, r in enumerate(self.group_means) if g != self.high]
        return (
            self.group_means[self.high] - torch.stack(others).min()
            if others
            else torch.zeros_like(self.group_means[0])
        )


@dataclass(frozen=True)
class Weights:
    """One weight per trajectory, before and after clamping."""

    raw: Tensor  # [B]; mean 1 over the global batch
    values: Tensor  # [B], w_i
    # [B], of the KL coefficient: w_i, or 1 where w_i multiplies the KL penalty, too
    kl_divisor: Tensor


# ------------------------------------------------------------------------------- losses and updates


@dataclass(frozen=True)
class TokenStats:
    """An actor's or a reference's numbers for each token."""

    logprobs: Tensor  # [b, T]
    entropy: Tensor | None  # [b, T], of the distribution the token was drawn from, nats


@dataclass(frozen=True)
class CriticOutput:
    values: Tensor  # [b, T]
    group_logits: Tensor | None  # [b, M]


@dataclass(frozen=True)
class Loss:
    """Terms {name: (sum over units, unit)}, unit = token | sequence | pair. The role divides each
    term once, by the global count of its unit."""

    terms: dict[str, tuple[Tensor, str]]
    metrics: Metrics = field(default_factory=dict)


Output = TokenStats | CriticOutput | Tensor  # Tensor: scores [b] of a reward model
BatchLoss = Callable[[Any, Any], Loss]  # (Output, Rows) -> Loss


@dataclass(frozen=True)
class Update:
    """Outcome of one optimizer step, or of several."""

    metrics: Metrics  # the loss's own, plus grad_norm and learning_rate
    # row ids behind a non-finite loss or gradient; the step was not taken
    skipped: tuple[int, ...] | None = None

    def merge(self, other: Update) -> Update:
        """Return the outcome of both steps."""
        skipped = [step.skipped for step in (self, other) if step.skipped is not None]
        return Update(
            merge_metrics(self.metrics, other.metrics),
            sum(skipped, ()) if skipped else None,
        )


def skipped_rows(**updates: Update) -> dict[str, tuple[int, ...]]:
    """Return {what was skipped, and why: row ids} of the roles' updates."""
    return {
        f"{role} not updated, non-finite loss or gradient": step.skipped
        for role, step in updates.items()
        if step.skipped is not None
    }


@dataclass(frozen=True)
class StepResult:
    """Outcome of one iteration of an algorithm."""

    metrics: Metrics
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows for samples.jsonl
    # what was skipped, and why -> row ids
    skipped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: int = 0  # prompt + response tokens of this replica's rows
    # the step's work in forward passes over those tokens; a training pass is three
    forward_equivalents: int = 0
