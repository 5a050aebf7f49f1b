"""One PPO / GIPO step in plain single-process torch, in float64 over Hugging Face's model: what the
real page must agree with.

Written from docs/algorithm.md, with loops where the package has formulas and autograd where it has
closed forms. Old log-probs, values and labels come from older weights than those that are trained,
so that ratios leave the clip range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import LlamaForCausalLM

from gipo_megatron.types import Rollout, Sequences, TokenStats
from tests.parity import tiny
from tools.gpu.tiny_adapters import hf_adapted

MINIBATCH = 4
CLIP, VALUE_CLIP, ENTROPY, PTX = 0.2, 0.3, 0.01, 0.3
# narrow limits of the weight: some rows are clamped
BETA, BETA_CRITIC, LABEL_ENTROPY, LOW, HIGH_WEIGHT = 0.9, 0.7, 0.2, 0.75, 1.2
# narrow bounds of the price, as well
ETA, FLOOR, CEILING, GAP, HIGH = (
    0.3,
    0.9,
    1.1,
    0.2,
    1,
)  # the price's ramp is half way; group 1 is the high one
GAMMA, LAM, SHAPED_CLIP, RETURN_CLIP = 0.98, 0.9, 0.8, 3.0
LENGTH_PENALTY = 0.05
CAP = 1.2  # of the weights between the sampler and the model
SCORES = (-0.8, -1.3, 0.4, 2.2, -0.2, 0.1, 0.9, 1.5)
SOURCES = ("easy", "hard")


def stored_score(prompt: str, response: str, extras: dict[str, float]) -> float:
    """The reward function of the stored rollout."""
    return extras["score"]


def stored_rollout() -> Rollout:
    rows = tiny.sequences(tiny.RAGGED, 3)
    size, even = len(rows), -math.log(tiny.ARCHITECTURE.vocab_size)
    drawn = even + 0.4 * torch.randn(rows.mask.shape, generator=tiny.generator(33))
    return Rollout(
        tokens=rows.tokens,
        mask=rows.mask,
        prompt_lengths=rows.prompt_lengths,
        finished=torch.ones(size, dtype=torch.bool),
        generation_logprobs=torch.where(rows.mask, drawn, 0.0),  # of a sampler unlike the model
        response_text=tuple(f"response {i}" for i in range(size)),
        prompt_id=torch.arange(size) // 2,
        sample_id=torch.arange(size),
        source=tuple(SOURCES[i % 2] for i in range(size)),
        extras=tuple({"prompt": f"prompt {i // 2}", "score": x} for i, x in enumerate(SCORES)),
    )


def hf_model(version: str, adapted: bool = False) -> LlamaForCausalLM:
    """live: what is trained; old: what the rollout came from; reference: where KL is measured
    from. They differ in what is trained: all weights, or the adapters alone."""
    model = hf_adapted() if adapted else tiny.hf_model()
    g = tiny.generator({"live": 0, "old": 31, "reference": 32}[version])
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=g) * (version != "live"))
    return model


@dataclass(frozen=True)
class Plain:
    returns: Tensor  # R_g [M]
    masses: Tensor  # [M]
    weights: Tensor  # w [N], mass variance
    uniform_weights: Tensor  # w [N] of the paper's variance, not clamped
    clipped: float  # share of tokens outside the ratio clip
    capped: float  # share of tokens whose weight is the cap
    actor: list[dict[str, Tensor]]  # gradients of each minibatch
    critic: list[dict[str, Tensor]]


@cache
def plain_step(num_groups: int = 2, adapted: bool = False) -> Plain:
    """Everything of one iteration on the stored rollout."""
    rollout = stored_rollout()
    rows, mask = rollout.sequences, rollout.mask
    versions = ("live", "old", "reference")
    live, old_model, reference_model = (hf_model(v, adapted).double() for v in versions)
    score, head = tiny.score_weight().double(), tuple(t.double() for t in group_head())
    with torch.no_grad():
        old, reference = (
            tiny.hf_token_stats(m, rows).logprobs for m in (old_model, reference_model)
        )
        critic = tiny.hf_critic(tiny.hf_hidden(old_model, rows), score, head, rows)
    assert critic.group_logits is not None
    raw = torch.tensor(SCORES, dtype=torch.float64) - LENGTH_PENALTY * mask.sum(1)
    shaped = ((raw - raw.mean()) / raw.std(unbiased=False)).clamp(-SHAPED_CLIP, SHAPED_CLIP)
    G = ((raw - raw.mean()) / raw.std(unbiased=False)).clamp(-RETURN_CLIP, RETURN_CLIP)

    p = critic.group_logits.softmax(1).requires_grad_()
    masses = p.sum(0)
    R = torch.stack(
        [sum(p[i, g] * G[i] for i in range(len(G))) / masses[g] for g in range(num_groups)]
    )
    share = masses / len(G)
    (coefficients,) = torch.autograd.grad((share * (R - G.mean()).square()).sum() * len(G), p)
    p, R, masses, share = p.detach(), R.detach(), masses.detach(), share.detach()
    weights = (1 - 2 * BETA * (p * (R - G.mean())).sum(1)).clamp(LOW, HIGH_WEIGHT)
    uniform = 1 - BETA * (2 / num_groups) * (p * (R - R.mean()) / share).sum(1)

    ramp = (GAP - 0.1) / 0.2
    price = 1 - ramp * (1 - p[:, HIGH])
    price = price / price.mean()
    shift = brentq(lambda x: float((price + x).clamp(FLOOR, CEILING).mean()) - 1, -2, 2)
    price = ETA * (price + shift).clamp(FLOOR, CEILING) / weights
    advantages, returns = estimate(-price[:, None] * (old - reference), shaped, critic.values, mask)
    ratios = (tiny.hf_token_stats(live, rows).logprobs.detach() - old).exp()[mask]

    blocks = [torch.arange(start, start + MINIBATCH) for start in range(0, len(G), MINIBATCH)]
    assert rollout.generation_logprobs is not None
    corrections = (old - rollout.generation_logprobs.double()).exp().clamp(max=CAP)
    weighted = advantages * weights[:, None] * corrections
    return Plain(
        returns=R,
        masses=masses,
        weights=weights,
        uniform_weights=uniform,
        clipped=float(((ratios - 1).abs() > CLIP).double().mean()),
        capped=float((corrections == CAP)[mask].double().mean()),
        actor=[actor_gradients(live, rows.select(b), old[b], weighted[b]) for b in blocks],
        critic=[
            critic_gradients(live, rows.select(b), critic.values[b], returns[b], coefficients[b])
            for b in blocks
        ],
    )


def group_head() -> tuple[Tensor, Tensor]:
    """Weight [2, H] and bias [2] that the parity tests put into every group head."""
    return torch.randn(
        2, tiny.ARCHITECTURE.hidden_size, generator=tiny.generator(5)
    ) * 0.2, torch.tensor([0.1, -0.2])


def estimate(
    rewards: Tensor, shaped: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages (whitened) and returns, [B, T]: sums over the deltas that follow each token."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(mask)):
        at = mask[b].nonzero().squeeze(1).tolist()
        r = [float(rewards[b, t]) + (float(shaped[b]) if t == at[-1] else 0.0) for t in at]
        v = [float(values[b, t]) for t in at] + [0.0]
        delta = [r[k] + GAMMA * v[k + 1] - v[k] for k in range(len(at))]
        for k, t in enumerate(at):
            advantages[b, t] = sum((GAMMA * LAM) ** (j - k) * delta[j] for j in range(k, len(at)))
            returns[b, t] = advantages[b, t] + v[k]
    kept = advantages[mask]
    return torch.where(
        mask, (advantages - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt(), 0.0
    ), returns


def actor_gradients(
    model: LlamaForCausalLM, rows: Sequences, old: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    stats, text = tiny.hf_token_stats(model, rows), tiny.pretraining()
    assert isinstance(stats, TokenStats) and stats.entropy is not None
    ratio = (stats.logprobs - old).exp()
    gain = (
        torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        + ENTROPY * stats.entropy
    )
    likelihood = tiny.hf_token_stats(model, text).logprobs[text.mask].mean()
    (-gain[rows.mask].mean() - PTX * likelihood).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def critic_gradients(
    model: LlamaForCausalLM, rows: Sequences, old: Tensor, returns: Tensor, coefficients: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    score = tiny.score_weight().double().requires_grad_()
    head = tuple(t.double().requires_grad_() for t in group_head())
    output = tiny.hf_critic(tiny.hf_hidden(model, rows), score, head, rows)
    assert output.group_logits is not None
    near = old + (output.values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
    value = (
        torch.maximum((output.values - returns).square(), (near - returns).square())[
            rows.mask
        ].mean()
        / 2
    )
    p = output.group_logits.softmax(1)
    gain = (coefficients * p - LABEL_ENTROPY * p * p.log()).sum(1).mean()
    (value - BETA_CRITIC * gain).backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        **named,
        "score.weight": score.grad,
        "group.weight": head[0].grad,
        "group.bias": head[1].grad,
    }
