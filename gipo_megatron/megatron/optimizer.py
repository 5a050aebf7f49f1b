"""mcore's distributed Adam over DDP-wrapped chunks, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.param_sharding import placements
from gipo_megatron.megatron.schedules import quiet
from gipo_megatron.specs import Optimisation, Precision

SCHEDULES = ("constant", "cosine", "linear")


@dataclass
class LearningRate:
    """lr(k) = lr · min(1, (k + 1) / warmup) before the decay; after the warm-up, with u = progress
    from 0 to 1 at `total_steps`:

    constant: lr;  cosine: lr (0.1 + 0.9 (1 + cos πu) / 2);  linear: lr (1 - u).

    k counts steps that were taken.

    Raises ValueError for an unknown schedule, or a decay without `total_steps` beyond the warm-up.
    """

    optimisation: Optimisation
    steps: int = 0

    def __post_init__(self) -> None:
        o = self.optimisation
        if o.schedule not in SCHEDULES:
            raise ValueError(
                f"unknown learning rate schedule {o.schedule!r}; one of {', '.join(SCHEDULES)}"
            )
        if o.schedule != "constant" and o.total_steps <= o.warmup_steps:
            raise ValueError(
                f"a {o.schedule} schedule needs total_steps ({o.total_steps}) > warmup_steps"
                f" ({o.warmup_steps})"
            )

    @property
    def scale(self) -> float:
        """The share of lr that the next step uses."""
        o = self.optimisation
        if self.steps < o.warmup_steps:
            return (self.steps + 1) / o.warmup_steps
        if o.schedule == "constant":
            return 1.0
        done = min(1.0, (self.steps - o.warmup_steps) / (o.total_steps - o.warmup_steps))
        return (
            1.0 - done
            if o.schedule == "linear"
            else 0.1 + 0.9 * (1.0 + math.cos(math.pi * done)) / 2.0
        )

    @property
    def value(self) -> float:
        return self.optimisation.lr * self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


def wrap(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """mcore's DDP around each chunk: flat fp32 gradient buffers, *summed* over the replicas,
    sharded by the distributed optimizer.

    With several replicas a bucket's sum starts as soon as the last micro-batch has its gradients,
    while the backward pass goes on.
    """
    config = chunks[0].config
    config.calculate_per_token_loss = True  # DDP then sums; nothing but our own count divides
    replicas = parallel_state.get_data_parallel_world_size()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=replicas > 1
    )
    with cpu_compat.host_mode():
        # only the first chunk buckets, as in Megatron-LM: later chunks' reductions overlap with
        # other work anyway
        return [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]


def mark_shards(chunks: list[GPTModel], vocab_size: int) -> None:
    """Tell mcore which parameters are split over the tensor group: it counts the others' gradients
    on one rank only, for the norm.

    mcore marks them itself only when it also draws their initial values, which model.py does
    instead. Before `wrap`.
    """
    for chunk in chunks:
        for place, parameter in placements(chunk, vocab_size):
            if place.dim is not None:
                marks: Any = parameter
                marks.tensor_model_parallel, marks.partition_dim, marks.partition_stride = (
                    True,
                    place.dim,
                    1,
                )


def build_optimizer(
    wrapped: list[DistributedDataParallel], optimisation: Optimisation, precision: Precision
) -> MegatronOptimizer:
    """Adam with fp32 master weights, its state sharded over the data parallel group."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimisation.lr,
        min_lr=0.0,
        weight_decay=optimisation.weight_decay,
        adam_beta1=optimisation.beta1,
        adam_beta2=optimisation.beta2,
        adam_eps=optimisation.eps,
        bf16=precision.dtype == "bf16",
        params_dtype=torch.bfloat16 if precision.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=optimisation.clip_grad,
    )
    with cpu_compat.host_mode():
        optimizer = get_megatron_optimizer(config, wrapped)
        for part in optimizer.chained_optimizers:
            # else a model that was never stepped (critic warm-up) has no moments to save
            if part.init_state_fn is not None:
                part.init_state_fn(part.optimizer, config)
        return optimizer


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the whole model's gradient, equal on every rank; readies the gradients for
    `clipped_step`.

    mcore chooses which gradients count on this rank: its share of the flat buffers, without copies
    that other ranks count. One kernel over all of them and one value read, where mcore without
    Transformer Engine reads one value a parameter.
    """
    with quiet():
        optimizer.prepare_grads()
        counted = [
            grad
            for part in optimizer.chained_optimizers
            for grad in part.get_main_grads_for_grad_norm()
        ]
        group = optimizer.get_grad_stats_parallel_group()
    if counted:
        square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted))).square()
    else:
        square = torch.zeros((), device=torch.cuda.current_device())
    dist.all_reduce(square, group=group)
    return float(square) ** 0.5


def clipped_step(
    optimizer: MegatronOptimizer, norm: float, optimisation: Optimisation, lr: float
) -> None:
    """One step on g · min(1, clip / norm); clip 0 is off. After `gradient_norm`. Norms and biases
    are not decayed."""
    clip = optimisation.clip_grad
    for group in optimizer.param_groups:
        group["lr"] = lr
        # mcore leaves this to its scheduler
        group["weight_decay"] = optimisation.weight_decay * group["wd_mult"]
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    scale = clip / (norm + 1e-6)
    if grads and 0 < scale < 1:
        torch._foreach_mul_(grads, scale)
    with quiet():
        optimizer.step_with_ready_grads()
