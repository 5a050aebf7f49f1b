"""Small networks in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import TokenStats


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
    """Move each position's value to the next one; zeros at 0. [B, T, …]"""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def token_stats(logits: Tensor, tokens: Tensor, mask: Tensor) -> TokenStats:
    """Return log-probs and entropy; logits [B, T, V] are of the token at each position."""
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, torch.where(mask, tokens, 0)[..., None])[..., 0]
    return TokenStats(
        torch.where(mask, chosen, 0.0), torch.where(mask, -(logp.exp() * logp).sum(-1), 0.0)
    )


def group_net(head: HeadSpec, inputs: int, hidden: int, seed: int) -> nn.Module:
    if not hidden:
        return Linear(inputs, head.num_groups, seed, head.init_std)
    return nn.Sequential(
        Linear(inputs, hidden, seed, inputs**-0.5),
        nn.Tanh(),
        Linear(hidden, head.num_groups, seed + 1, head.init_std),
    )
