"""A group head on the reward model's frozen trunk, for algorithms without a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

from gipo_megatron.components.groups import Variance
from gipo_megatron.metrics import Metric, Metrics, merge_metrics
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import DataParallel, RewardModel
from gipo_megatron.specs import width_scaled
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import BatchLoss, Rollout, Rows, Update


@final
@register("group_classifier", "reward_head")
@dataclass
class RewardHead:
    """p_i = softmax(W h_i + b), trained to maximise R_var; h_i is a hidden state of the reward
    model.

    The reward model and not the actor: its trunk is frozen, so that labels change only as the head
    learns and the policy's gradient stays that of its own loss; and it is the trunk that a critic
    would start from. W and b are replicated on every rank, with an optimiser of their own.
    """

    num_groups: Annotated[int, Range(1)] = 2  # M
    # prompt: hidden state of the last prompt token, can only learn difficulty | trajectory: of the
    # last token
    input: Annotated[str, OneOf("prompt", "trajectory")] = "prompt"
    variance: Variance = "mass"
    # weight of the labels' entropy beside R_var: without it they are certain before they are right
    entropy: Annotated[float, Range(0)] = 0.03
    # the head's own learning rate, for a trunk of width 128; divided by width / 128
    lr: float = 1e-3
    # standard deviation of the head's first weights, for a trunk of width 128; divided by
    # sqrt(width / 128); above 0, since equal labels have no gradient
    init_std: Annotated[float, Range(0, open=True)] = 0.02

    reward_models: dict[str, RewardModel] = from_runtime("reward_models")
    seed: int = from_runtime("seed")
    dp: DataParallel = from_runtime("dp")

    head: ClassVar[None] = None  # none on a critic
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    largest_norm: ClassVar[float] = 1.0  # of the gradient

    def __post_init__(self) -> None:
        self._linear: torch.nn.Linear | None = None  # made when the width of the trunk is known
        self._restored: dict[str, Any] = {}

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        assert logits is not None
        return logits.softmax(-1)

    def logits(self, rows: Rows) -> Tensor:
        """Return group logits, [B, M]."""
        with torch.no_grad():
            return self._read(rows)

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        """Make one Adam step on the sum of all parts' terms, each divided by its global unit count;
        none after a gradient that is not finite."""
        metrics: Metrics = {}
        for rows, loss in parts:
            outcome = loss(self._read(rows), rows)
            for total, unit in outcome.terms.values():
                count = self.dp.sum(total.detach().new_tensor(float(rows.counts()[unit])))
                (total / count).backward()
            metrics = merge_metrics(metrics, outcome.metrics)
        assert self._linear is not None
        parameters = list(self._linear.parameters())
        for p in parameters:
            p.grad = self.dp.sum(p.grad if p.grad is not None else torch.zeros_like(p))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.largest_norm)
        if finite := bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad()
        if not finite:
            return Update({}, tuple(i for rows, _ in parts for i in rows.row_ids.tolist()))
        return Update({**metrics, "grad_norm": Metric.mean(norm)})

    def _read(self, rows: Rows) -> Tensor:
        features = self.reward_models["reward"].features(rows, self.input).float()
        if self._linear is None:
            self._build(features.shape[1], features.device)
        assert self._linear is not None
        logits: Tensor = self._linear(features)
        return logits

    def _build(self, width: int, device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        lr, init_std = width_scaled(self.lr, self.init_std, width)
        weight = init_std * torch.randn(self.num_groups, width, generator=generator)
        sizes = width, self.num_groups
        self._linear = torch.nn.utils.skip_init(torch.nn.Linear, *sizes, device=device)
        with torch.no_grad():
            self._linear.weight.copy_(weight)
            self._linear.bias.zero_()
        self._optimizer = torch.optim.Adam(self._linear.parameters(), lr=lr)
        if self._restored:
            self._linear.load_state_dict(self._restored["weights"])
            self._optimizer.load_state_dict(self._restored["optimizer"])

    def state_dict(self) -> dict[str, Any]:
        if self._linear is None:
            return self._restored
        weights = {name: p.detach().cpu().clone() for name, p in self._linear.named_parameters()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the head itself is made with the first batch."""
        self._linear, self._restored = None, state
