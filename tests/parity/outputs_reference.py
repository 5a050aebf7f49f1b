"""Log-probs, entropies and their gradients by float64 log_softmax and autograd, with a padded odd
vocabulary and ragged rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gipo_megatron.types import Sequences, TokenStats


@dataclass(frozen=True)
class ReadoutCase:
    hidden: Tensor  # fp32 [b, T, H]
    # fp32 [padded, H]; the padding rows give large logits that must not count
    weight: Tensor
    sequences: Sequences
    weights: Tensor  # [2, b, T], of the two sums that are differentiated
    vocab: int = 245

    @staticmethod
    def make() -> ReadoutCase:
        g = torch.Generator().manual_seed(0)
        prompt, length, width = torch.tensor([2, 1, 5]), torch.tensor([6, 12, 9]), 12
        t = torch.arange(width)
        mask = (t >= prompt[:, None]) & (t < length[:, None])
        hidden = torch.randn(3, width, 16, generator=g)
        weight = torch.randn(256, 16, generator=g) * 0.75  # logits of deviation 3
        weight[245:] = 20.0
        tokens = torch.randint(0, 245, (3, width), generator=g)
        # edges of two shards, and of blocks of 64 columns
        tokens[1, 3], tokens[1, 4], tokens[1, 5] = 127, 128, 244
        tokens[1, 6], tokens[1, 7] = 63, 64
        return ReadoutCase(
            hidden,
            weight,
            Sequences(tokens, mask, prompt, length, torch.arange(3)),
            torch.randn(2, 3, width, generator=g),
        )

    def total(self, stats: TokenStats) -> Tensor:
        """The sum that is differentiated."""
        assert stats.entropy is not None
        return (stats.logprobs * self.weights[0]).sum() + (stats.entropy * self.weights[1]).sum()


def stats_of_logits(
    logits: Tensor, sequences: Sequences, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) in the dtype of the logits [b, T, V]."""
    log_p = torch.log_softmax(logits[:, :-1] / temperature, -1)
    pad = torch.nn.functional.pad
    picked = log_p.gather(2, sequences.tokens[:, 1:, None]).squeeze(2)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return pad(picked, (1, 0)) * sequences.mask, pad(entropy, (1, 0)) * sequences.mask


def plain_token_stats(
    case: ReadoutCase, temperature: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, gradients of the weighted sum with respect to the hidden states and
    the weight), float64, of logits that are rounded to `dtype`."""
    hidden, weight = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    logits = hidden @ weight[: case.vocab].T
    logits = logits + (logits.to(dtype).double() - logits).detach()
    stats = TokenStats(*stats_of_logits(logits, case.sequences, temperature))
    case.total(stats).backward()
    assert hidden.grad is not None and weight.grad is not None and stats.entropy is not None
    return stats.logprobs.detach(), stats.entropy.detach(), hidden.grad, weight.grad
