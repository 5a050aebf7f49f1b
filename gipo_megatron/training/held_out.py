"""Held-out evaluation during a run: one function per kind of model, each returning metrics under
`eval/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.components.protocols import Reward
from gipo_megatron.data.batching import Dataset
from gipo_megatron.roles import Actor, DataParallel, Reference, RewardModel
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Metric, Metrics, Pairs, merge_metrics


@dataclass
class HeldOut:
    """`rows` held-out rows, evenly spread over all of them (files hold one source after the other),
    in `batch`-row pieces.

    Both counts are global. The last piece is padded with rows that do not count.
    """

    data: Dataset
    dp: DataParallel
    rows: int
    batch: int

    @property
    def indices(self) -> list[int]:
        count = min(self.rows, len(self.data))
        return [i * len(self.data) // count for i in range(count)]

    def pieces(self, at: Callable[..., Any]) -> Iterator[tuple[Any, Tensor]]:
        """(rows of this replica, float weights [b]: 0 for padding)."""
        indices = self.indices
        for start in range(0, len(indices), self.batch):
            piece, valid = at(indices[start : start + self.batch], self.dp.rank, self.dp.size)
            yield piece, valid.double()


def evaluate_sft(actor: Actor, held_out: HeldOut) -> Metrics:
    """eval/loss: nats per response token."""
    metrics: Metrics = {}
    for batch, valid in held_out.pieces(held_out.data.examples_at):
        logprobs = actor.logprobs(batch).logprobs
        weights = batch.mask.to(logprobs.device) * valid.to(logprobs.device)[:, None]
        metrics = merge_metrics(metrics, {"eval/loss": Metric.mean(-logprobs, weights)})
    return metrics


def evaluate_reward_model(reward: RewardModel, held_out: HeldOut) -> Metrics:
    """`evaluate_pairs` by Bradley-Terry on the scores."""

    def judge(batch: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = reward.score(batch).chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected), chosen - rejected

    return evaluate_pairs(judge, held_out)


def evaluate_pairs(judge: Callable[[Pairs], tuple[Tensor, Tensor]], held_out: HeldOut) -> Metrics:
    """eval/{loss, accuracy, margin, pairs} of held-back pairs, and eval/accuracy/<source>; judge:
    pairs -> loss [b], margin [b]."""
    metrics: Metrics = {}
    for batch, valid in held_out.pieces(held_out.data.pairs_at):
        loss, margin = judge(batch)
        weights = valid.to(margin.device)
        right = (margin > 0).double()
        new = {
            "eval/loss": Metric.mean(loss, weights),
            "eval/accuracy": Metric.mean(right, weights),
            "eval/margin": Metric.mean(margin, weights),
            "eval/pairs": Metric.sum(weights),
        }
        for source in held_out.data.sources:
            rows = weights * torch.tensor(
                [s == source for s in batch.source], device=weights.device
            )
            new[f"eval/accuracy/{source}"] = Metric.mean(right, rows)
        metrics = merge_metrics(metrics, new)
    return metrics


def evaluate_policy(
    actor: Actor,
    reference: Reference,
    reward: Reward,
    gold: Callable[[str, str], float] | None,
    held_out: HeldOut,
    sources: Sequence[str],
    sampling: Sampling,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Responses to held-out prompts, the same noise every time.

    eval/{score, kl, length, truncated}, eval/score/<source>, and eval/gold[/<source>] where the
    data know a gold reward. The score is the reward's raw one; kl is k1, nats per response, of the
    sampled (truncated) distribution's tokens.
    """
    metrics: Metrics = {}
    samples: list[dict[str, Any]] = []
    for prompts, valid in held_out.pieces(held_out.data.prompts_at):
        rollout = actor.generate(prompts, sampling)
        raw, _ = reward.raw(rollout)
        weights = valid.to(raw.device)
        kl = ops.sequence_sum(
            actor.logprobs(rollout).logprobs - reference.logprobs(rollout).logprobs, rollout.mask
        )
        values = {
            "score": raw,
            "kl": kl,
            "length": rollout.response_lengths.double(),
            "truncated": (~rollout.finished).double(),
        }
        by_source = {"score": raw}
        texts = list(zip(rollout.extras, rollout.response_text, strict=True))
        if gold is not None:
            golds = raw.new_tensor([gold(extras["prompt"], response) for extras, response in texts])
            values["gold"] = by_source["gold"] = golds
        new = {f"eval/{name}": Metric.mean(value, weights) for name, value in values.items()}
        for source in sources:
            rows = weights * torch.tensor([s == source for s in rollout.source], device=raw.device)
            new |= {
                f"eval/{name}/{source}": Metric.mean(value, rows)
                for name, value in by_source.items()
            }
        metrics = merge_metrics(metrics, new)
        samples += [
            {"prompt": extras["prompt"], "response": response, "score": float(score)}
            for (extras, response), score, counts in zip(texts, raw, weights.tolist(), strict=True)
            if counts
        ]
    return metrics, samples
