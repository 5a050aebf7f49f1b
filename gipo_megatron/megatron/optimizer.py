"""mcore's distributed Adam over DDP-wrapped chunks, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.mesh import DataParallelGroup
from gipo_megatron.megatron.param_sharding import placements
from gipo_megatron.specs import Optimisation, Precision

SCHEDULES = ("constant", "cosine", "linear")


@dataclass
class LearningRate:
    """The learning rate after k steps: lr · (k + 1) / warmup in the warm-up; then, with u from 0 to
    1 at `total_steps`,

        constant: lr;  cosine: lr (0.1 + 0.9 (1 + cos πu) / 2);  linear: lr (1 - u).

    Raises ValueError for an unknown schedule, and for a decay that ends before the warm-up.
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
        """The factor of lr in the next step."""
        o = self.optimisation
        if self.steps < o.warmup_steps:
            return (self.steps + 1) / o.warmup_steps
        if o.schedule == "constant":
            return 1.0
        done = min(1.0, (self.steps - o.warmup_steps) / (o.total_steps - o.warmup_steps))
        if o.schedule == "linear":
            return 1.0 - done
        return 0.1 + 0.9 * (1.0 + math.cos(math.pi * done)) / 2.0

    @property
    def value(self) -> float:
        return self.optimisation.lr * self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


def wrap(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Wrap each chunk in mcore's DDP: flat fp32 gradient buffers, *summed* over the replicas and
    sharded by the distributed optimizer.

    With several replicas the sum of a bucket overlaps with the backward pass of the last
    micro-batch.
    """
    config = chunks[0].config
    config.calculate_per_token_loss = True  # DDP then sums; only our own count divides
    replicas = parallel_state.get_data_parallel_world_size()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=replicas > 1
    )
    with cpu_compat.host_mode():
        # buckets in the first chunk only, as in Megatron-LM: the reductions of later chunks overlap
        # with other work anyway
        wrapped = [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
    if replicas == 1:
        for group in (group for chunk in wrapped for group in chunk.bucket_groups):
            # both are copies of a whole buffer to itself, and gloo makes a second one for each
            group.start_grad_sync = group.start_param_sync = _no_exchange
    return wrapped


def _no_exchange(**options: bool) -> None:
    """Send nothing: there is one replica."""


def whole_gradients(
    wrapped: Iterable[DistributedDataParallel], group: DataParallelGroup
) -> list[Tensor]:
    """Return the gradient buffers with the sums of all replicas, in the weights' dtype. Collective
    over `group`, the replicas."""
    gathered = []
    for buffer in (buffer for chunk in wrapped for buffer in chunk.buffers):
        whole = torch.empty_like(buffer.grad_data)
        # each rank holds the sum only in its own shard of every bucket
        for bucket in buffer.buckets:
            shards = bucket.grad_data.chunk(group.size)
            end = bucket.offset + bucket.grad_data.numel()
            parts = list(whole[bucket.offset : end].chunk(group.size))
            dist.all_gather(parts, shards[group.rank], group=group.group)
        gathered.append(whole.to(buffer.param_data.dtype))
    return gathered


def mark_shards(chunks: list[GPTModel], vocab_size: int) -> None:
    """Mark the parameters that are split over the tensor group: for the norm, mcore counts the
    gradients of the others on one rank only. Call it before `wrap`.

    mcore marks only parameters that it initialises, and here model.py does that.
    """
    for chunk in chunks:
        for place, parameter in placements(chunk, vocab_size):
            if place.dim is not None:
                marks: Any = parameter
                marks.tensor_model_parallel = True
                marks.partition_dim, marks.partition_stride = place.dim, 1


def build_optimizer(
    wrapped: list[DistributedDataParallel], optimisation: Optimisation, precision: Precision
) -> MegatronOptimizer:
    """Build Adam with fp32 master weights and its state sharded over the data parallel group."""
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
            # so that a model without a step (in the critic's warm-up) has moments to save
            if part.init_state_fn is not None:
                part.init_state_fn(part.optimizer, config)
        return optimizer


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the norm of the whole model's gradient, equal on every rank, and prepare the gradients
    for `clipped_step`.

    mcore selects the gradients that count on this rank: its share of the flat buffers, without
    copies that other ranks count. One kernel takes the norm of all and one value is read; mcore
    without Transformer Engine reads one value per parameter.
    """
    with cpu_compat.host_mode():
        optimizer.prepare_grads()
        counted = [grad for part in optimizer.chained_optimizers for grad in _counted(part)]
        group = optimizer.get_grad_stats_parallel_group()
    if counted:
        square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted))).square()
    else:
        square = torch.zeros((), device=torch.cuda.current_device())
    dist.all_reduce(square, group=group)
    return float(square) ** 0.5


def _counted(part: Any) -> list[Tensor]:
    """Return the gradients that count on this rank. mcore 0.19 renamed the method."""
    if hasattr(part, "get_main_grads_for_grad_norm"):
        return part.get_main_grads_for_grad_norm()
    return part.get_grads_for_grad_norm()


def clipped_step(
    optimizer: MegatronOptimizer, norm: float, optimisation: Optimisation, lr: float
) -> None:
    """Step on g · min(1, clip / norm), after `gradient_norm`; clip 0 is off. Norms and biases have
    no weight decay."""
    clip = optimisation.clip_grad
    for group in optimizer.param_groups:
        group["lr"] = lr
        # set by mcore's scheduler, which is not used here
        group["weight_decay"] = optimisation.weight_decay * group["wd_mult"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    scale = clip / (norm + 1e-6)
    if grads and 0 < scale < 1:
        torch._foreach_mul_(grads, scale)
    with cpu_compat.host_mode():
        optimizer.step_with_ready_grads()
