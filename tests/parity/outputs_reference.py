"""Log-probs, entropies and their gradients by float64 log_softmax and autograd, with a padded odd
vocabulary and ragged rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gipo_megatron.types import Sequences


@dataclass(frozen=True)
class ReadoutCase:
    # fp32 [b, T, padded]; the padding columns hold large numbers that must not count
    logits: Tensor
    sequences: Sequences
    weights: Tensor  # [2, b, T], of the two sums that are differentiated
    vocab: int = 245

    @staticmethod
    def make() -> ReadoutCase:
        g = torch.Generator().manual_seed(0)
        prompt, length, width = torch.tensor([2, 1, 5]), torch.tensor([6, 12, 9]), 12
        t = torch.arange(width)
        mask = (t >= prompt[:, None]) & (t < length[:, None])
        logits = torch.randn(3, width, 256, generator=g) * 3
        logits[:, :, 245:] = 50.0
        tokens = torch.randint(0, 245, (3, width), generator=g)
        tokens[1, 3], tokens[1, 4], tokens[1, 5] = 127, 128, 244  # edges of the two shards
        return ReadoutCase(
            logits,
            Sequences(tokens, mask, prompt, length, torch.arange(3)),
            torch.randn(2, 3, width, generator=g),
        )


def plain_token_stats(case: ReadoutCase, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, gradient of the weighted sum with respect to the logits), float64."""
    x = case.logits.double().requires_grad_()
    log_p = torch.log_softmax(x[:, :-1, : case.vocab] / temperature, -1)
    mask, tokens = case.sequences.mask, case.sequences.tokens
    pad = torch.nn.functional.pad
    logprobs = pad(log_p.gather(2, tokens[:, 1:, None]).squeeze(2), (1, 0)) * mask
    entropy = pad(-(log_p.exp() * log_p).sum(-1), (1, 0)) * mask
    ((logprobs * case.weights[0]).sum() + (entropy * case.weights[1]).sum()).backward()
    assert x.grad is not None
    return logprobs.detach(), entropy.detach(), x.grad
