"""The arithmetic of drawing one token: no model, no collectives, no state.

Noise is one uniform number per (seed, step, sample_id, position) from a counter-based generator
(Philox), so a row's response depends neither on other rows nor on the rank that draws it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.specs import Sampling, refusals

_WORD = 2**64 - 1
# from which tokens are drawn at once: a CPU is faster on as many as its cache holds
_LOGITS = {"cpu": 2**18, "cuda": 2**62}


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError with every field that is out of range."""
    if problems := [f"{name} {why}" for name, why in refusals(sampling)]:
        raise UserError(
            "sampling: " + "; ".join(problems),
            where="the rollout's or the evaluation's sampling keys",
            fix="bring each into its range; temperature 0 is greedy, and top_k 0, top_p 1 and"
            " repetition_penalty 1 are off",
        )


def uniforms(sampling: Sampling, sample_id: Tensor) -> Tensor:
    """Draw U[0, 1) float64 [B, max_response] on the host. Row b is Philox(key=(seed, step),
    counter=(0, 0, sample_id[b], 0)).

    The noise of a shorter max_response is a prefix of the longer one's.
    """
    noise = np.empty((len(sample_id), sampling.max_response))
    for row, sample in zip(noise, sample_id.tolist(), strict=True):
        key = np.array([sampling.seed & _WORD, sampling.step & _WORD], dtype=np.uint64)
        counter = np.array([0, 0, sample & _WORD, 0], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key, counter=counter)).random(out=row)
    return torch.from_numpy(noise)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty, x / penalty if x > 0 else x * penalty, where `seen` (bool
    [b, V]). Source: CTRL (Keskar 2019), as in Hugging Face."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits [b, V] to -inf outside the top-k tokens (ties with the k-th stay), then outside
    the smallest set whose probability reaches top_p.

    Of equal logits at top-p's border the lower token ids stay, so the result does not depend on the
    sort.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        probs = ordered.double().softmax(-1)
        # the tokens before it already reach top_p; never true for the first one
        outside = probs.cumsum(-1) - probs >= top_p
        outside = torch.zeros_like(outside).scatter_(1, index, outside)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by the inverse CDF: return the first token whose cumulative softmax exceeds `uniform`
    [b], and the logsumexp [b] of the float32 logits [b, V].

    A token of probability 0 is never drawn. Sums are float64, so that layouts which differ in the
    last bit of a logit draw the same token.
    """
    peak = logits.amax(-1, keepdim=True)
    mass = (logits - peak).exp_().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(mass, target[:, None], right=True)[:, 0]
    return tokens, peak[:, 0] + total.log().to(logits.dtype)


def pick_bytes(sampling: Sampling) -> int:
    """Return the most bytes that `pick` needs per logit of a row: fp32, its exponential and a sum
    in fp64; with truncation also a sort and its sums."""
    truncated = sampling.top_p < 1 or sampling.top_k > 0
    return 64 if truncated or sampling.repetition_penalty != 1 else 16


def pick(
    logits: Tensor, sampling: Sampling, uniform: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return tokens [b] (-1 where the logits are not finite) and their log-probs [b].

    The order is Hugging Face's: repetition penalty, temperature, top-k, top-p. The log-prob is
    that of the distribution drawn from, so after penalty and truncation (when greedy: of the
    softmax at temperature 1). `seen` bool [b, V] is needed with a repetition penalty only.
    """
    size = max(1, _LOGITS[logits.device.type] // logits.shape[-1])
    parts = []
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        mask = seen[rows] if seen is not None else None
        parts.append(_pick(logits[rows], sampling, uniform[rows], mask))
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _pick(
    logits: Tensor, sampling: Sampling, uniform: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `pick` of rows that fit into the cache."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    scores = logits
    if sampling.repetition_penalty != 1:
        assert seen is not None
        # it scales logits and so commutes with the temperature
        scores = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens, logsumexp = scores.argmax(-1), scores.logsumexp(-1)
    else:
        scores = truncate(scores, sampling.top_k, sampling.top_p)
        tokens, logsumexp = draw(scores, uniform)
    tokens = torch.where(logsumexp.isfinite(), tokens, -1)
    return tokens, scores.gather(1, tokens.clamp(min=0)[:, None])[:, 0] - logsumexp
