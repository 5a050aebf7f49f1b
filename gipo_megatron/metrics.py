"""Metrics: reductions that add over micro-batches, minibatches and replicas."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from gipo_megatron.tensors import Tensor, torch


@dataclass(frozen=True)
class Metric:
    """Sufficient statistics that add, or of which the extreme is taken, over micro-batches,
    minibatches and replicas."""

    # sum | mean | std | effective_sample_size | correlation | explained_variance | min | max
    kind: str
    parts: Tensor  # float64 [k]

    @staticmethod
    def sum(values: Tensor | float) -> Metric:
        return Metric("sum", torch.as_tensor(values).detach().double().sum().reshape(1))

    @staticmethod
    def mean(values: Tensor | float, weights: Tensor | None = None) -> Metric:
        """sum(w x) / sum(w); w = 1 when not given. NaN when the weights sum to zero."""
        x = torch.as_tensor(values).detach().double()
        w = torch.ones_like(x) if weights is None else weights.detach().double().expand_as(x)
        return Metric("mean", torch.stack([torch.where(w != 0, w * x, 0.0).sum(), w.sum()]))

    @staticmethod
    def ratio(total: Tensor | float, count: Tensor | float) -> Metric:
        """total / count of two sums. NaN when the count is zero."""
        sums = [torch.as_tensor(x).detach().double() for x in (total, count)]
        return Metric("mean", torch.stack(sums))

    @staticmethod
    def std(values: Tensor) -> Metric:
        """Population standard deviation."""
        x = values.detach().double().flatten()
        return Metric("std", torch.stack([torch.ones_like(x).sum(), x.sum(), x.square().sum()]))

    @staticmethod
    def effective_sample_size(weights: Tensor) -> Metric:
        """(sum w)² / (n sum w²), Kish's effective share of n samples, in (0, 1]."""
        return Metric("effective_sample_size", Metric.std(weights).parts)

    @staticmethod
    def _paired(kind: str, x: Tensor, y: Tensor) -> Metric:
        x, y = x.detach().double().flatten(), y.detach().double().flatten()
        return Metric(
            kind,
            torch.stack(
                [
                    torch.ones_like(x).sum(),
                    x.sum(),
                    y.sum(),
                    x.square().sum(),
                    y.square().sum(),
                    (x * y).sum(),
                ]
            ),
        )

    @staticmethod
    def correlation(x: Tensor, y: Tensor) -> Metric:
        """Pearson's r."""
        return Metric._paired("correlation", x, y)

    @staticmethod
    def explained_variance(target: Tensor, prediction: Tensor) -> Metric:
        """1 - Var(target - prediction) / Var(target)"""
        return Metric._paired("explained_variance", target, target.double() - prediction.double())

    @staticmethod
    def min(values: Tensor) -> Metric:
        return Metric("min", values.detach().double().min().reshape(1))

    @staticmethod
    def max(values: Tensor) -> Metric:
        return Metric("max", values.detach().double().max().reshape(1))

    def merge(self, other: Metric) -> Metric:
        assert self.kind == other.kind, f"{self.kind} merged with {other.kind}"
        if self.kind in ("min", "max"):
            return Metric(self.kind, getattr(torch, f"{self.kind}imum")(self.parts, other.parts))
        return Metric(self.kind, self.parts + other.parts)

    def result(self) -> float:
        """Return the number to show; NaN where it is undefined (nothing counted, no variance)."""
        p = self.parts.tolist()
        if self.kind in ("sum", "min", "max"):
            return p[0]
        if self.kind == "mean":
            return p[0] / p[1] if p[1] else float("nan")
        n = p[0]
        if not n:
            return float("nan")
        if self.kind == "effective_sample_size":
            return p[1] ** 2 / (n * p[2]) if p[2] else float("nan")
        if self.kind == "std":
            return max(p[2] / n - (p[1] / n) ** 2, 0.0) ** 0.5
        var_x, var_y = p[3] / n - (p[1] / n) ** 2, p[4] / n - (p[2] / n) ** 2
        if var_x <= 1e-12 * max(p[3] / n, 1e-300):  # rounding of a constant
            return float("nan")
        if self.kind == "explained_variance":
            return 1 - var_y / var_x
        if var_y <= 1e-12 * max(p[4] / n, 1e-300):
            return float("nan")
        return (p[5] / n - p[1] * p[2] / n**2) / (var_x * var_y) ** 0.5


Metrics = dict[str, Metric]


def merge_metrics(into: Metrics, new: Metrics) -> Metrics:
    """Return both; a name in both is merged."""
    return {**into, **{name: into[name].merge(m) if name in into else m for name, m in new.items()}}


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """Rename `loss` to `prefix/loss`; keep a name that already has a slash."""
    return {name if "/" in name else f"{prefix}/{name}": metric for name, metric in metrics.items()}


def digest(text: str) -> int:
    """Return a 48-bit hash of `text`, which float64 represents exactly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
