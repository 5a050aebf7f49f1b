"""Held-out evaluation that several algorithms share; metrics under `eval/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gipo_megatron import ops
from gipo_megatron.components.protocols import Sampler
from gipo_megatron.components.reward import Reward
from gipo_megatron.metrics import Metric, Metrics, merge_metrics
from gipo_megatron.roles import Actor, HeldOut, Reference, RewardModel
from gipo_megatron.specs import Sampling
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Pairs, Rollout


def evaluate_pairs(
    loss_and_margin: Callable[[Pairs], tuple[Tensor, Tensor]], held_out: HeldOut
) -> Metrics:
    """Return eval/{loss, accuracy, margin, pairs}, and eval/accuracy/<source>, of held-out pairs.

    loss_and_margin: pairs -> both [b]; a positive margin is a right one.
    """
    metrics: Metrics = {}
    for batch, valid in held_out.batches():
        loss, margin = loss_and_margin(batch)
        weights = valid.to(margin.device)
        right = (margin > 0).double()
        new = {
            "eval/loss": Metric.mean(loss, weights),
            "eval/accuracy": Metric.mean(right, weights),
            "eval/margin": Metric.mean(margin, weights),
            "eval/pairs": Metric.sum(weights),
        }
        for source in held_out.sources:
            rows = weights * _is_from(source, batch.source, weights)
            new[f"eval/accuracy/{source}"] = Metric.mean(right, rows)
        metrics = merge_metrics(metrics, new)
    return metrics


def evaluate_policy(
    sampler: Sampler,
    actor: Actor,
    reference: Reference,
    reward: Reward,
    gold: RewardModel | None,
    held_out: HeldOut,
    sources: Sequence[str],
    sampling: Sampling,
    trained: Sampling,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Respond to held-out prompts, with the same noise every time; return metrics and sample rows.

    eval/{score, kl, length, truncated}, eval/{score, prompts}/<source>, and eval/gold[/<source>]:
    the score of the model `gold`, or without it the gold reward that the data define. The score is
    the reward's raw one. kl is k1, nats per response: an estimate of KL(pi || ref) only on samples
    of pi, so it has responses of its own, to the first batch of prompts, drawn as `trained`.
    """
    metrics: Metrics = {}
    samples: list[dict[str, Any]] = []
    for prompts, valid in held_out.batches():
        rollout = sampler.respond(actor, prompts, sampling)
        raw, _ = reward.raw(rollout)
        weights = valid.to(raw.device)
        values = {
            "score": raw,
            "length": rollout.response_lengths.double(),
            "truncated": (~rollout.finished).double(),
        }
        by_source = {"score": raw}
        if gold is not None:
            values["gold"] = by_source["gold"] = gold.score(rollout)
        elif held_out.gold is not None:
            values["gold"] = by_source["gold"] = raw.new_tensor(_gold(held_out.gold, rollout))
        if not metrics:
            drawn = sampler.respond(actor, prompts, trained)
            values["kl"] = _kl(actor, reference, drawn)
        new = {f"eval/{name}": Metric.mean(value, weights) for name, value in values.items()}
        for source in sources:
            rows = weights * _is_from(source, rollout.source, weights)
            new[f"eval/prompts/{source}"] = Metric.sum(rows)
            new |= {
                f"eval/{name}/{source}": Metric.mean(value, rows)
                for name, value in by_source.items()
            }
        metrics = merge_metrics(metrics, new)
        texts = zip(rollout.extras, rollout.source, rollout.response_text, strict=True)
        for i, (extras, source, response) in enumerate(texts):
            if weights[i]:
                own = {name: value[i].item() for name, value in by_source.items()}
                row = {"prompt": extras["prompt"], "source": source, "response": response}
                samples.append(row | own)
    return metrics, samples


def _kl(actor: Actor, reference: Reference, rollout: Rollout) -> Tensor:
    """k1, nats per response. [B]"""
    log_ratio = actor.logprobs(rollout).logprobs - reference.logprobs(rollout).logprobs
    return ops.sequence_sum(log_ratio, rollout.mask)


def _is_from(source: str, sources: tuple[str, ...], like: Tensor) -> Tensor:
    return torch.tensor([s == source for s in sources], device=like.device)


def _gold(gold: Callable[[str, str], float], rollout: Rollout) -> list[float]:
    texts = zip(rollout.extras, rollout.response_text, strict=True)
    return [gold(extras["prompt"], response) for extras, response in texts]
