"""Metrics of a PPO iteration (docs/metrics.md)."""

from __future__ import annotations

from typing import Any

from gipo_megatron import ops
from gipo_megatron.components.rollout import token_ratios
from gipo_megatron.metrics import Metric, Metrics, digest, prefixed
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Experience, Groups, Rollout, Scores, TokenStats, Update, Weights

# two rows of one prompt, in batches of other shapes, get the same label up to float rounding
SAME_LABEL = 1e-6


def rollout_metrics(rollout: Rollout, logprobs: Tensor, cap: float, dp: DataParallel) -> Metrics:
    """`distinct`: share of different responses in the global batch. effective_sample_size and
    capped: of the ratios trainer / sampler, used or not."""
    texts = gather_rows(
        torch.tensor([digest(text) for text in rollout.response_text], device=logprobs.device), dp
    )
    metrics = {
        "rollout/length_mean": Metric.mean(rollout.response_lengths),
        "rollout/truncated": Metric.mean((~rollout.finished).float()),
        "rollout/distinct": Metric.mean(len(texts.unique()) / len(texts)),
    }
    if rollout.generation_logprobs is not None:
        gap = (rollout.generation_logprobs - logprobs).abs()
        metrics["rollout/logprob_gap_mean"] = Metric.mean(gap, rollout.mask)
        metrics["rollout/logprob_gap_max"] = Metric.max(torch.where(rollout.mask, gap, 0.0))
        ratios = token_ratios(logprobs.double(), rollout)[rollout.mask]
        metrics["rollout/effective_sample_size"] = Metric.effective_sample_size(ratios)
        metrics["rollout/capped"] = Metric.mean(ratios > cap)
    return metrics


def score_metrics(scores: Scores, rollout: Rollout, dp: DataParallel) -> Metrics:
    """between_prompts: share of the scores' variance that lies between prompts. Where it is large,
    scores of different prompts cannot be compared, and groups would follow the offsets."""
    share = ops.between_share(gather_rows(scores.raw, dp), gather_rows(rollout.prompt_id, dp))
    parts = {f"reward/{name}_mean": Metric.mean(value) for name, value in scores.parts.items()}
    return {
        "reward/score_mean": Metric.mean(scores.raw),
        "reward/score_std": Metric.std(scores.raw),
        "reward/between_prompts": Metric.mean(share),
        **parts,
    }


def kl_metrics(response_kl: Tensor, coefficients: Tensor) -> Metrics:
    return {
        "kl/mean": Metric.mean(response_kl),
        "kl/coef_mean": Metric.mean(coefficients),
        "kl/priced_mean": Metric.mean(coefficients * response_kl),
    }


def group_metrics(groups: Groups, scores: Scores, rollout: Rollout, response_kl: Tensor) -> Metrics:
    """Means per group, weighted by p_ig; correlations of p_high with score and length, which it
    should not merely copy."""
    metrics: Metrics = {
        "groups/high_corr_score": Metric.correlation(groups.high_prob, scores.raw),
        "groups/high_corr_length": Metric.correlation(
            groups.high_prob, rollout.response_lengths.double()
        ),
    }
    for g, probs in enumerate(groups.probs.T):
        metrics[f"groups/score_{g}"] = Metric.mean(scores.raw, probs)
        metrics[f"groups/kl_{g}"] = Metric.mean(response_kl, probs)
        metrics[f"groups/length_{g}"] = Metric.mean(rollout.response_lengths, probs)
        metrics[f"groups/truncated_{g}"] = Metric.mean((~rollout.finished).float(), probs)
    return metrics


def split_metrics(
    groups: Groups, scores: Scores, rollout: Rollout, sources: tuple[str, ...], dp: DataParallel
) -> Metrics:
    """Compare the learned split with given labels (auc, ami) and with the response itself
    (response_split).

    auc: p_high against "from the first source by name", a fixed one, so that no step turns its
    sign; response_split: AUC, within prompts, of p_high against "scored above the prompt's mean"
    (algorithm.md 5.9), the mean over prompts that have both kinds; labels that differ by rounding
    alone (SAME_LABEL) are equal.
    """
    high, raw = gather_rows(groups.high_prob, dp).cpu(), gather_rows(scores.raw, dp).cpu()
    prompt = gather_rows(rollout.prompt_id, dp).cpu()
    index = torch.tensor([sources.index(s) for s in rollout.source], device=scores.raw.device)
    source = gather_rows(index, dp).long().cpu()
    hard = gather_rows(groups.probs.argmax(1), dp).cpu()

    _, which, sizes = prompt.unique(return_inverse=True, return_counts=True)
    above = (
        raw > (torch.zeros(len(sizes), dtype=raw.dtype).index_add_(0, which, raw) / sizes)[which]
    )
    within = ops.auc(above, high, prompt, tie=SAME_LABEL)
    within = within[within.isfinite()]
    metrics = {"groups/response_split": Metric.mean(float(within.mean()) if len(within) else 0.5)}
    if len(source.unique()) > 1:
        from sklearn.metrics import adjusted_mutual_info_score  # slow to import

        metrics["groups/auc"] = Metric.mean(ops.auc(source == 0, high, torch.zeros_like(source)))
        metrics["groups/ami"] = Metric.mean(
            float(adjusted_mutual_info_score(source.numpy(), hard.numpy()))
        )
    return metrics


def source_metrics(
    groups: Groups, scores: Scores, rollout: Rollout, response_kl: Tensor, sources: tuple[str, ...]
) -> Metrics:
    """Means per source; every replica lists every source, so that the reductions line up."""
    metrics: Metrics = {}
    for name in sources:
        rows = torch.tensor(
            [s == name for s in rollout.source], device=scores.raw.device, dtype=torch.float64
        )
        metrics[f"source/{name}/score"] = Metric.mean(scores.raw, rows)
        metrics[f"source/{name}/return"] = Metric.mean(
            scores.standardised_scores * scores.std, rows
        )
        metrics[f"source/{name}/kl"] = Metric.mean(response_kl, rows)
        metrics[f"source/{name}/p_high"] = Metric.mean(groups.high_prob, rows)
    return metrics


def weight_metrics(weights: Weights) -> Metrics:
    return {
        "weights/mean": Metric.mean(weights.values),
        "weights/min": Metric.min(weights.values),
        "weights/max": Metric.max(weights.values),
        "weights/clamped": Metric.mean((weights.raw != weights.values).float()),
    }


def value_metrics(experience: Experience, update: Update) -> Metrics:
    if experience.values is None:
        return {}
    mask = experience.rollout.mask
    explained = Metric.explained_variance(experience.returns[mask], experience.values[mask])
    return prefixed("value", {"explained_variance": explained, **update.metrics})


def policy_metrics(loss: Tensor, output: TokenStats, batch: Experience, clip: float) -> Metrics:
    """Metrics of one micro-batch, without gradients. loss [b, T] is per token."""
    mask = batch.rollout.mask
    with torch.no_grad():
        ratio = torch.exp(output.logprobs - batch.logprobs)
        weighted = batch.advantages * batch.weights[:, None]
        # where the clipped branch is the loss: the ratio has gone the way the advantage pulls
        clipped = torch.where(weighted > 0, ratio > 1 + clip, ratio < 1 - clip).float()
        metrics = {
            "loss": Metric.mean(loss, mask),
            "clip_fraction": Metric.mean(clipped, mask),
            "ratio_max": Metric.max(torch.where(mask, ratio, 0.0)),
        }
        if output.entropy is not None:
            metrics["entropy"] = Metric.mean(output.entropy, mask)
        for g, probs in enumerate(batch.group_probs.T):
            by_token = probs[:, None] * mask
            metrics[f"groups/clip_fraction_{g}"] = Metric.mean(clipped, by_token)
            if output.entropy is not None:
                metrics[f"groups/entropy_{g}"] = Metric.mean(output.entropy, by_token)
    return metrics


def sample_rows(
    rollout: Rollout, scores: Scores, groups: Groups, weights: Weights, response_kl: Tensor
) -> list[dict[str, Any]]:
    """Return rows for samples.jsonl, one per sequence of this replica."""
    columns = zip(
        rollout.sample_id.tolist(),
        rollout.source,
        rollout.extras,
        rollout.response_text,
        scores.raw.tolist(),
        groups.high_prob.tolist(),
        weights.values.tolist(),
        response_kl.tolist(),
        rollout.response_lengths.tolist(),
        strict=True,
    )
    return [
        {
            "sample_id": i,
            "source": s,
            "prompt": e["prompt"],
            "response": r,
            "score": x,
            "p_high": h,
            "weight": w,
            "kl": k,
            "length": n,
        }
        for i, s, e, r, x, h, w, k, n in columns
    ]
