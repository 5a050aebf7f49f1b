"""Roles in plain PyTorch, small enough to read: tests and examples run the real algorithms on
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gipo_megatron.local.networks import Linear, Trunk, group_net, shifted, token_stats
from gipo_megatron.metrics import Metric, Metrics, merge_metrics
from gipo_megatron.roles import DataParallel, SingleReplica
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.types import BatchLoss, CriticOutput, Prompts, Rollout, Rows, TokenStats, Update

EOS = 0  # the token that ends a response


# ------------------------------------------------------------------------------- one optimizer step


@dataclass
class Stepper:
    """Adam on some parameters, with a clip of their gradient norm."""

    parameters: list[nn.Parameter]
    lr: float
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.lr, betas=self.betas)

    def step(self, dp: DataParallel) -> float:
        for p in self.parameters:
            p.grad = dp.sum(p.grad if p.grad is not None else torch.zeros_like(p))
        norm = (
            nn.utils.clip_grad_norm_(self.parameters, self.clip) if self.clip else torch.zeros(())
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def backward(
    parts: Sequence[tuple[Rows, BatchLoss]],
    forward: Callable[[Any], Any],
    dp: DataParallel,
    micro_batch: int,
) -> Metrics:
    """Add the gradients of all terms, each over its unit's global count, one micro-batch at a
    time."""
    metrics: Metrics = {}
    for rows, loss in parts:
        count = {unit: dp.sum(torch.tensor(float(n))) for unit, n in rows.counts().items()}
        for start in range(0, len(rows), micro_batch or len(rows)):
            batch = rows.block(start, start + (micro_batch or len(rows)))
            outcome = loss(forward(batch), batch)
            terms = [value / count[unit] for value, unit in outcome.terms.values()]
            reduce(torch.add, terms).backward()
            metrics = merge_metrics(metrics, outcome.metrics)
    return metrics


# ---------------------------------------------------------------------------------------- the roles


class TorchActor:
    """A policy, or a reference when it is never updated. It generates tokens below `num_actions`
    (0: all)."""

    def __init__(
        self,
        vocab: int,
        hidden: int = 64,
        lr: float = 3e-3,
        seed: int = 0,
        dp: DataParallel | None = None,
        micro_batch: int = 0,
        init_std: float = 0.0,
        clip: float = 1.0,
        dtype: torch.dtype = torch.float32,
        num_actions: int = 0,
    ) -> None:
        self.trunk = Trunk(vocab, hidden, seed).to(dtype)
        self.output = Linear(hidden, num_actions or vocab, seed + 1, init_std).to(dtype)
        self.dp, self.micro_batch = dp or SingleReplica(), micro_batch
        self.version = 0
        self.end_ids = (EOS,)
        self.parameters = [*self.trunk.parameters(), *self.output.parameters()]
        self._stepper = Stepper(self.parameters, lr, clip)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of the token at each position."""
        return self.output(shifted(self.trunk(tokens)))

    def _stats(self, batch: Rows) -> TokenStats:
        s = batch.sequences
        return token_stats(self.logits(s.tokens), s.tokens, s.mask)

    @torch.no_grad()
    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        return self._stats(batch)

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Sample responses; noise is a function of (seed, step, sample_id, position)."""
        rows, longest = len(prompts), int(prompts.lengths.max()) + sampling.max_response
        tokens = torch.zeros(rows, longest, dtype=torch.int64)
        tokens[:, : prompts.tokens.shape[1]] = prompts.tokens[:, :longest]
        mask = torch.zeros(rows, longest, dtype=torch.bool)
        finished = torch.zeros(rows, dtype=torch.bool)
        logprobs = torch.zeros(rows, longest)
        noise = torch.stack(
            [_noise(sampling, int(i), self.output.bias.numel()) for i in prompts.sample_id]
        )
        every = torch.arange(rows)
        for t in range(sampling.max_response):
            at = prompts.lengths + t
            logp = (
                (self.output(self.trunk(tokens))[every, at - 1] / sampling.temperature)
                .log_softmax(-1)
                .float()
            )
            token = (logp - noise[:, t].log()).argmax(-1)
            active = ~finished
            tokens[every[active], at[active]] = token[active]
            mask[every[active], at[active]] = True
            logprobs[every[active], at[active]] = logp[every, token][active]
            finished |= token == EOS
        return Rollout(
            tokens=tokens,
            mask=mask,
            prompt_lengths=prompts.lengths,
            finished=finished,
            generation_logprobs=logprobs,
            response_text=tuple(
                " ".join(str(token) for token, inside in zip(row, m, strict=True) if inside)
                for row, m in zip(tokens.tolist(), mask.tolist(), strict=True)
            ),
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            source=prompts.source,
            extras=prompts.extras,
        )

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        metrics = backward(parts, self._stats, self.dp, self.micro_batch)
        self.version += 1
        return Update({**metrics, "grad_norm": Metric.mean(self._stepper.step(self.dp))})

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from (
            (name, p.detach())
            for name, p in [*self.trunk.named_parameters(), *self.output.named_parameters()]
        )


def _noise(sampling: Sampling, sample_id: int, vocab: int) -> Tensor:
    """Return exponential draws, [max_response, V]; minus their log is Gumbel noise."""
    generator = torch.Generator().manual_seed(
        (sampling.seed * 1_000_003 + sampling.step) * 1_000_003 + sample_id
    )
    return torch.empty(sampling.max_response, vocab).exponential_(generator=generator)


class TorchCritic:
    """A value head and, with a HeadSpec, a group head with its own optimizer and clip;
    `group_hidden` > 0 makes that head a two-layer net."""

    def __init__(
        self,
        vocab: int,
        head: HeadSpec | None = None,
        hidden: int = 64,
        lr: float = 3e-3,
        seed: int = 100,
        dp: DataParallel | None = None,
        micro_batch: int = 0,
        group_hidden: int = 0,
        clip: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.trunk, self.value = (
            Trunk(vocab, hidden, seed).to(dtype),
            Linear(hidden, 1, seed + 1, 0.1).to(dtype),
        )
        self.dp, self.micro_batch, self.head = dp or SingleReplica(), micro_batch, head
        self.parameters = [*self.trunk.parameters(), *self.value.parameters()]
        self.group = (
            group_net(head, hidden, group_hidden, seed + 2).to(dtype) if head is not None else None
        )
        self._stepper = Stepper(self.parameters, lr, clip)
        self._group_stepper = (
            Stepper(list(self.group.parameters()), head.lr, clip)
            if head is not None and self.group is not None
            else None
        )

    def forward(self, batch: Rows) -> CriticOutput:
        s = batch.sequences
        hidden = self.trunk(s.tokens)
        values = torch.where(s.mask, self.value(shifted(hidden))[..., 0], 0.0)
        if self.head is None or self.group is None:
            return CriticOutput(values, None)
        last = s.prompt_lengths if self.head.input == "prompt" else s.lengths
        read = hidden[torch.arange(len(hidden)), last - 1]
        return CriticOutput(values, self.group(read.detach() if self.head.detach_trunk else read))

    @torch.no_grad()
    def evaluate(self, batch: Rows) -> CriticOutput:
        return self.forward(batch)

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        metrics = backward(parts, self.forward, self.dp, self.micro_batch)
        norm = self._stepper.step(self.dp)
        if self._group_stepper is not None:
            self._group_stepper.step(self.dp)
        return Update({**metrics, "grad_norm": Metric.mean(norm)})


class TorchRewardModel:
    """A scorer that reads the last token."""

    def __init__(
        self,
        vocab: int,
        hidden: int = 64,
        lr: float = 3e-3,
        seed: int = 200,
        dp: DataParallel | None = None,
    ) -> None:
        self.trunk, self.output = Trunk(vocab, hidden, seed), Linear(hidden, 1, seed + 1, 0.1)
        self.dp = dp or SingleReplica()
        self.parameters = [*self.trunk.parameters(), *self.output.parameters()]
        self._stepper = Stepper(self.parameters, lr)

    def forward(self, batch: Rows) -> Tensor:
        s = batch.sequences
        hidden = self.trunk(s.tokens)
        return self.output(hidden[torch.arange(len(hidden)), s.lengths - 1])[..., 0]

    @torch.no_grad()
    def score(self, batch: Rows) -> Tensor:
        return self.forward(batch)

    @torch.no_grad()
    def features(self, batch: Rows, position: str) -> Tensor:
        s = batch.sequences
        last = s.prompt_lengths if position == "prompt" else s.lengths
        return self.trunk(s.tokens)[torch.arange(len(last)), last - 1]

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        metrics = backward(parts, self.forward, self.dp, 0)
        return Update({**metrics, "grad_norm": Metric.mean(self._stepper.step(self.dp))})
