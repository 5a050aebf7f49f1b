"""A KL controller."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.registry import Range, register
from gipo_megatron.types import Groups


@register("kl_controller", "stepped")
@dataclass
class SteppedKL:
    """coef = eta for `iterations` iterations, then eta / 10."""

    eta: Annotated[float, Range(0)] = 0.1
    iterations: Annotated[int, Range(1)] = 2

    def __post_init__(self) -> None:
        self.seen = 0

    def kl_coefficients(self, groups: Groups) -> Tensor:
        eta = self.eta if self.seen < self.iterations else self.eta / 10
        return torch.full_like(groups.high_prob, eta)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        self.seen += 1
        return {"kl/iterations": Metric.mean(float(self.seen))}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
