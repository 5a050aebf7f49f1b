"""A tiny Llama with heads, ragged batches, and losses: what part `parity` and the training tests
run on both sides.

The sides are Hugging Face + autograd, and mcore.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gipo_megatron.metrics import Metric
from gipo_megatron.specs import Architecture, HeadSpec
from gipo_megatron.types import CriticOutput, Loss, Pairs, Rows, Sequences, TokenStats

VOCAB = 250  # not a multiple of 64: mcore pads it
ARCHITECTURE = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    max_positions=64,
)
GROUP = HeadSpec(num_groups=2, input="prompt", detach_trunk=False, init_std=0.2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hf_model() -> LlamaForCausalLM:
    """Weights from one generator of its own, large enough that all parts of the gradient count."""
    a = ARCHITECTURE
    config = LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        rms_norm_eps=a.norm_eps,
        rope_theta=a.rope_base,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).float()
    g = generator(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


def score_weight() -> Tensor:
    return torch.randn(1, ARCHITECTURE.hidden_size, generator=generator(2)) * 0.3


def group_weights() -> tuple[Tensor, Tensor]:
    """W [M, H] and b [M] of a group head."""
    return torch.randn(
        GROUP.num_groups, ARCHITECTURE.hidden_size, generator=generator(4)
    ) * GROUP.init_std, torch.zeros(GROUP.num_groups)


def sequences(lengths: list[tuple[int, int]], seed: int, first_id: int = 0) -> Sequences:
    """Rows of (prompt length, response length)."""
    prompt, response = torch.tensor(lengths).unbind(1)
    width = int((prompt + response).max())
    t = torch.arange(width)
    whole = (prompt + response)[:, None]
    tokens = torch.randint(0, VOCAB, (len(lengths), width), generator=generator(seed))
    return Sequences(
        tokens=torch.where(t < whole, tokens, 0),
        mask=(t >= prompt[:, None]) & (t < whole),
        prompt_lengths=prompt,
        lengths=prompt + response,
        ids=torch.arange(first_id, first_id + len(lengths)),
    )


@dataclass(frozen=True)
class Weighted(Rows):
    """Sequences with what a PPO loss needs: per token old log-probs, advantages, returns; per
    sequence group coefficients."""

    inner: Sequences
    old: Tensor
    advantages: Tensor
    returns: Tensor
    coefficients: Tensor

    @property
    def sequences(self) -> Sequences:
        return self.inner

    @property
    def row_ids(self) -> Tensor:
        return self.inner.ids


RAGGED = [(3, 9), (6, 2), (2, 14), (5, 5), (1, 3), (8, 11), (4, 7), (7, 1)]


def weighted(seed: int = 3) -> Weighted:
    rows = sequences(RAGGED, seed)
    g = generator(seed + 100)
    noise = [torch.randn(rows.mask.shape, generator=g) * rows.mask for _ in range(3)]
    # coefficients lean to one side: else the bias's gradient is the small rest of large terms, and
    # its relative error only rounding
    coefficients = 0.5 * torch.randn(len(rows), 2, generator=g) + torch.tensor([1.0, -1.0])
    return Weighted(rows, noise[0] * 0.1 - 5.5 * rows.mask, noise[1], noise[2], coefficients)


def pretraining() -> Sequences:
    return sequences([(1, 17), (1, 6), (1, 11), (1, 2)], 7, first_id=100)


def pairs() -> Pairs:
    chosen = sequences([(3, 9), (6, 2), (2, 4), (5, 5)], 8)
    rejected = sequences([(3, 2), (6, 8), (2, 10), (5, 1)], 9)
    width = max(chosen.tokens.shape[1], rejected.tokens.shape[1])

    def wide(s: Sequences) -> Sequences:
        pad = (0, width - s.tokens.shape[1])
        tokens, mask = torch.nn.functional.pad(s.tokens, pad), torch.nn.functional.pad(s.mask, pad)
        return Sequences(tokens, mask, s.prompt_lengths, s.lengths, s.ids)

    return Pairs(wide(chosen), wide(rejected), ("test",) * 4)


# ------------------------------------------------------------------------------------------- losses


def ppo_loss(output: TokenStats, rows: Weighted) -> Loss:
    mask, ratio = rows.inner.mask, (output.logprobs - rows.old).exp()
    surrogate = torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.2) * rows.advantages)
    assert output.entropy is not None
    return Loss(
        {
            "policy": (-(surrogate * mask).sum(), "token"),
            "entropy": (-0.01 * (output.entropy * mask).sum(), "token"),
        },
        {
            "ratio_max": Metric.max(ratio[mask]),
            "ratio": Metric.mean(ratio[mask]),
            "rows": Metric.sum(float(len(rows))),
        },
    )


def language_loss(output: TokenStats, rows: Sequences) -> Loss:
    return Loss({"ptx": (-0.3 * (output.logprobs * rows.mask).sum(), "token")})


def critic_loss(output: CriticOutput, rows: Weighted) -> Loss:
    mask = rows.inner.mask
    terms = {"value": (0.5 * ((output.values - rows.returns).square() * mask).sum(), "token")}
    if output.group_logits is not None:
        terms["groups"] = (-(rows.coefficients * output.group_logits.softmax(1)).sum(), "sequence")
    return Loss(terms, {"value_max": Metric.max(output.values[mask])})


def pair_loss(scores: Tensor, rows: Pairs) -> Loss:
    chosen, rejected = scores.chunk(2)
    return Loss(
        {"rm": (-torch.nn.functional.logsigmoid(chosen - rejected).sum(), "pair")},
        {"margin": Metric.mean(chosen - rejected)},
    )


# ------------------------------------------------------------------------------ Hugging Face's side


def hf_hidden(model: LlamaForCausalLM, rows: Sequences) -> Tensor:
    attention = (torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None]).long()
    return model.model(input_ids=rows.tokens, attention_mask=attention).last_hidden_state


def hf_token_stats(model: LlamaForCausalLM, rows: Sequences) -> TokenStats:
    logits = model.lm_head(hf_hidden(model, rows))[:, :-1]
    logp = (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)
    picked = logp.gather(-1, rows.tokens[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    shift = torch.nn.functional.pad
    return TokenStats(
        torch.where(rows.mask, shift(picked, (1, 0)), 0.0),
        torch.where(rows.mask, shift(entropy, (1, 0)), 0.0),
    )


def hf_scores(model: LlamaForCausalLM, score: Tensor, rows: Sequences) -> Tensor:
    """[b], read at each sequence's last token."""
    last = hf_hidden(model, rows)[torch.arange(len(rows)), rows.lengths - 1]
    return (last.float() @ score.float().T).squeeze(1)


def hf_critic(
    hidden: Tensor, score: Tensor, group: tuple[Tensor, Tensor], rows: Sequences
) -> CriticOutput:
    values = torch.nn.functional.pad((hidden @ score[0])[:, :-1], (1, 0))
    at_prompt = hidden[torch.arange(len(rows)), rows.prompt_lengths - 1]
    return CriticOutput(torch.where(rows.mask, values, 0.0), at_prompt @ group[0].T + group[1])


def hf_gradients(
    kind: str, dtype: torch.dtype = torch.float32, model: LlamaForCausalLM | None = None
) -> dict[str, Tensor]:
    """The gradient of the whole batch's loss by plain autograd, {HF name: tensor}, of `hf_model`,
    unless another is given.

    kind: text (`language_loss`), reward (`pair_loss`), actor (`ppo_loss`) or critic (`critic_loss`,
    with `group_weights`).
    """
    model, score = (model or hf_model()).to(dtype), score_weight().to(dtype).requires_grad_()
    {"text": _text, "reward": _reward, "actor": _actor, "critic": _critic}[kind](
        model, score
    ).backward()
    return {
        name: p.grad.float()
        for name, p in {**dict(model.named_parameters()), "score.weight": score}.items()
        if p.grad is not None
    }


def _text(model: LlamaForCausalLM, score: Tensor) -> Tensor:
    text = pretraining()
    return language_loss(hf_token_stats(model, text), text).terms["ptx"][0] / text.mask.sum()


def _reward(model: LlamaForCausalLM, score: Tensor) -> Tensor:
    both = pairs()
    return pair_loss(hf_scores(model, score, both.sequences), both).terms["rm"][0] / len(both)


def _actor(model: LlamaForCausalLM, score: Tensor) -> Tensor:
    rows = weighted()
    terms = ppo_loss(hf_token_stats(model, rows.inner), rows).terms
    return sum(value for value, _ in terms.values()) / rows.inner.mask.sum()


def _critic(model: LlamaForCausalLM, score: Tensor) -> Tensor:
    rows = weighted()
    output = hf_critic(
        hf_hidden(model, rows.inner).float(), score.float(), group_weights(), rows.inner
    )
    terms = critic_loss(output, rows).terms
    return terms["value"][0] / rows.inner.mask.sum() + terms["groups"][0] / len(rows)


def relative_errors(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ per tensor. The names must be the same."""
    assert mine.keys() == theirs.keys(), f"{sorted(mine.keys() ^ theirs.keys())}"
    return {name: float((mine[name] - g).norm() / g.norm()) for name, g in theirs.items()}
