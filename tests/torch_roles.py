"""Roles in plain PyTorch, small enough to read: what tests run the real algorithms on. Also data
parallel replicas as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gipo_megatron.metrics import Metric, Metrics, merge_metrics
from gipo_megatron.roles import DataParallel, SingleReplica
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.types import BatchLoss, CriticOutput, Prompts, Rollout, Rows, TokenStats, Update

R = TypeVar("R")
EOS = 0


# ----------------------------------------------------------------------------------------- networks


class Trunk(nn.Module):
    """h_t = tanh(W mean-so-far(embedding)): causal, two layers. tokens [B, T] -> [B, T, H]."""

    def __init__(self, vocab: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(vocab, hidden, generator=generator))
        self.inner = nn.Parameter(torch.randn(hidden, hidden, generator=generator) / hidden**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens]
        so_far = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return torch.tanh((0.5 * x + 0.5 * so_far) @ self.inner)


class Linear(nn.Module):
    """Weights from its own generator; std 0 starts at zero."""

    def __init__(self, inputs: int, outputs: int, seed: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            std * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
        )
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def shifted(x: Tensor) -> Tensor:
    """What stands at t - 1, at position t; zeros at 0. [B, T, …]"""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def token_stats(logits: Tensor, tokens: Tensor, mask: Tensor) -> TokenStats:
    """logits [B, T, V] of the token at each position."""
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, torch.where(mask, tokens, 0)[..., None])[..., 0]
    return TokenStats(
        torch.where(mask, chosen, 0.0), torch.where(mask, -(logp.exp() * logp).sum(-1), 0.0)
    )


# ------------------------------------------------------------------------------- one optimizer step


@dataclass
class Stepper:
    """Adam on some parameters with its own clip at norm 1."""

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
    """Every term over its unit's global count, one micro-batch at a time."""
    metrics: Metrics = {}
    for rows, loss in parts:
        count = {unit: dp.sum(torch.tensor(float(n))) for unit, n in rows.counts().items()}
        for start in range(0, len(rows), micro_batch or len(rows)):
            batch = rows.block(start, start + (micro_batch or len(rows)))
            outcome = loss(forward(batch), batch)
            sum(value / count[unit] for value, unit in outcome.terms.values()).backward()
            metrics = merge_metrics(metrics, outcome.metrics)
    return metrics


# ---------------------------------------------------------------------------------------- the roles


class TorchActor:
    """A policy; as a reference too, when it is not updated. It only ever says tokens below
    `num_actions` (0: all)."""

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
        self.parameters = [*self.trunk.parameters(), *self.output.parameters()]
        self._stepper = Stepper(self.parameters, lr, clip)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V], of the token at each position."""
        return self.output(shifted(self.trunk(tokens)))

    def _stats(self, batch: Rows) -> TokenStats:
        s = batch.sequences
        return token_stats(self.logits(s.tokens), s.tokens, s.mask)

    @torch.no_grad()
    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        return self._stats(batch)

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Noise by (seed, step, sample_id, position); token 0 ends a response."""
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
                " ".join(str(int(x)) for x in row[m]) for row, m in zip(tokens, mask, strict=True)
            ),
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            source=prompts.source,
            extras=prompts.extras,
        )

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        metrics = backward(parts, self._stats, self.dp, self.micro_batch)
        return Update({**metrics, "grad_norm": Metric.mean(self._stepper.step(self.dp))})

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from (
            (name, p.detach())
            for name, p in [*self.trunk.named_parameters(), *self.output.named_parameters()]
        )


def _noise(sampling: Sampling, sample_id: int, vocab: int) -> Tensor:
    """[max_response, V] exponential draws; minus their log is Gumbel."""
    generator = torch.Generator().manual_seed(
        (sampling.seed * 1_000_003 + sampling.step) * 1_000_003 + sample_id
    )
    return torch.empty(sampling.max_response, vocab).exponential_(generator=generator)


class TorchCritic:
    """A value head and, if asked for, a group head with its own optimizer and clip; `group_hidden`
    > 0 makes that head a two-layer net."""

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
            _group_net(head, hidden, group_hidden, seed + 2).to(dtype) if head is not None else None
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


def _group_net(head: HeadSpec, inputs: int, hidden: int, seed: int) -> nn.Module:
    if not hidden:
        return Linear(inputs, head.num_groups, seed, head.init_std)
    return nn.Sequential(
        Linear(inputs, hidden, seed, inputs**-0.5),
        nn.Tanh(),
        Linear(hidden, head.num_groups, seed + 1, head.init_std),
    )


class TorchRewardModel:
    """A trainable scorer that reads the last token."""

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

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        metrics = backward(parts, self.forward, self.dp, 0)
        return Update({**metrics, "grad_norm": Metric.mean(self._stepper.step(self.dp))})


# ----------------------------------------------------------------------------------------- replicas


class _Thread:
    """One replica's side of a group of threads; sums are taken in rank order, so they do not depend
    on timing."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def _gather(self, x: Tensor) -> Tensor:
        self._slots[self.rank] = x
        self._barrier.wait()
        everyone = torch.stack(list(self._slots))
        self._barrier.wait()
        return everyone

    def sum(self, x: Tensor) -> Tensor:
        return self._gather(x).sum(0)

    def max(self, x: Tensor) -> Tensor:
        return self._gather(x).amax(0)


def run_replicas(size: int, work: Callable[[DataParallel], R]) -> list[R]:
    """work(dp) on `size` threads that reduce with each other; results in rank order. The first
    error is raised."""
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def target(rank: int) -> None:
        try:
            results[rank] = work(_Thread(rank, size, barrier, slots))
        except BaseException as error:  # the other threads wait at the barrier
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results


def replica_rows(rows: Any, dp: DataParallel) -> Any:
    """Global rows -> this replica's: global row i is row i // size of replica i % size."""
    return rows.select(torch.arange(dp.rank, len(rows), dp.size))
