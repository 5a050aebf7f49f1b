"""Policy, critic and group head of the batched bandit: R rows of every weight, and their Adam.

P prompts, A actions, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gipo_megatron.local.networks import Linear, Trunk

P, A, H = 64, 50, 64
GRADIENT_CLIP = 1.0


def _stacked(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack([x.detach() for x in column]) for column in zip(*parts, strict=True)]


def _trunk(seed: int) -> list[Tensor]:
    """Return the embedding of the prompts, whose tokens follow the actions, and the inner layer."""
    trunk = Trunk(A + P, H, seed)
    return [trunk.embedding[A:], trunk.inner]


def policy_weights(seeds: Sequence[int]) -> list[Tensor]:
    outputs = [Linear(H, A, 1000 * seed + 1, 0.0) for seed in seeds]
    return _stacked(
        [[*_trunk(1000 * s), o.weight, o.bias] for s, o in zip(seeds, outputs, strict=True)]
    )


def critic_weights(seeds: Sequence[int]) -> list[Tensor]:
    starts = [1000 * seed + 100 for seed in seeds]
    return _stacked([[*_trunk(s), *Linear(H, 1, s + 1, 0.1).parameters()] for s in starts])


def head_weights(seeds: Sequence[int]) -> list[Tensor]:
    starts = [1000 * seed + 102 for seed in seeds]
    return _stacked(
        [
            [*Linear(H, H, s, H**-0.5).parameters(), *Linear(H, 2, s + 1, 0.02).parameters()]
            for s in starts
        ]
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def hidden(weights: Sequence[Tensor]) -> Tensor:
    return torch.tanh(torch.bmm(weights[0], weights[1]))


def log_policy(weights: Sequence[Tensor]) -> Tensor:
    """Return log-probabilities [R, P, A]."""
    return linear(hidden(weights), weights[2], weights[3]).log_softmax(-1)


def value_and_features(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return V [R, P] and the trunk's output [R, P, H]."""
    h = hidden(weights)
    return linear(h, weights[2], weights[3])[..., 0], h


def group_logits(weights: Sequence[Tensor], features: Tensor) -> Tensor:
    return linear(torch.tanh(linear(features, *weights[:2])), *weights[2:])


class Stepper:
    """Adam; the gradient of each run is clipped by its own norm (clip 0: never)."""

    def __init__(self, weights: list[Tensor], lr: float, clip: float = GRADIENT_CLIP) -> None:
        self.weights, self.clip = weights, clip
        self.optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr, fused=True)

    def step(self) -> None:
        gradients = [w.grad for w in self.weights if w.grad is not None]
        if self.clip:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            scale = (self.clip / (norms + 1e-6)).clamp(max=1)
            for g in gradients:
                g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
        self.optimizer.step()
        self.optimizer.zero_grad()


def imitate(weights: list[Tensor], target: Tensor, steps: int = 150) -> list[Tensor]:
    """Return policy weights trained to `target` [R, P, A] by supervision, as SFT would."""
    if float(target.max() - target.min()) < 1e-6:  # the first policy is uniform already
        return weights
    stepper = Stepper([w.clone() for w in weights], 1e-2, clip=0)
    for _ in range(steps):
        (-(target * log_policy(stepper.weights)).sum(-1).mean(1).sum()).backward()
        stepper.step()
    return [w.detach() for w in stepper.weights]
