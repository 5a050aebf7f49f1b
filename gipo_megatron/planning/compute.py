"""Floating point operations of an iteration, and how long it may take: an estimate from data-sheet
rates and the assumptions below."""

from __future__ import annotations

from dataclasses import dataclass

from gipo_megatron.planning.activations import need_of
from gipo_megatron.planning.arithmetic import BatchPlan, batch_plan
from gipo_megatron.planning.memory import Footprint, Phase, slot_of
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.telemetry.performance import PEAK_FLOPS, flops

# share of the peak that matrix products reach, forward and backward, tensor parallel traffic
# included
ASSUMED_MFU = 0.40
DECODE_KERNELS = 22  # a layer of decode.Decoder launches about as many
LAUNCH_SECONDS = 5e-6  # of one kernel
REDUCE_SECONDS = 20e-6  # of one small all-reduce inside a node; a decoded layer has two
HOST_BANDWIDTH = 50e9  # bytes/s between a GPU and pinned host memory, PCIe 5 x16
NODE_BANDWIDTH = 50e9  # bytes/s a GPU between nodes, one 400 Gbit/s adapter each
NVLINK_BANDWIDTH = 450e9  # bytes/s a GPU within a node, one direction


@dataclass(frozen=True)
class Gpu:
    """Dense data-sheet rates of one GPU."""

    name: str
    bf16: float  # FLOP/s
    fp8: float  # FLOP/s; 0: has none
    bandwidth: float  # bytes/s of its own memory


# By memory in GiB, which is all a recipe says. 80 GiB is taken for an H100 (an A100 of 80 GiB: 312
# TFLOP/s, no FP8, 2.04 TB/s).
GPUS = {
    40: Gpu("A100 40 GB", PEAK_FLOPS["A100"], 0.0, 1.56e12),
    80: Gpu("H100 SXM", PEAK_FLOPS["H100"], 1979e12, 3.35e12),
    141: Gpu("H200 SXM", PEAK_FLOPS["H200"], 1979e12, 4.8e12),
}


@dataclass(frozen=True)
class Work:
    """Estimates for one part of an iteration."""

    name: str
    flops: float  # of all GPUs, without what is computed again
    recomputed: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    gpu: Gpu
    works: tuple[Work, ...]
    offload: float  # seconds of an iteration that tensors travel between host and device

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.works) + self.offload

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.works)


def gpu_of(recipe: Recipe) -> Gpu:
    """The listed GPU whose memory is nearest to the recipe's."""
    return GPUS[min(GPUS, key=lambda size: abs(size - recipe.hardware.gpu_memory_gib))]


def bubble(recipe: Recipe, slots: int) -> float:
    """Idle time over busy time of a pipeline: (p - 1) / (m v) (Narayanan et al. 2021)."""
    return (recipe.parallel.pipeline - 1) / (slots * recipe.parallel.virtual_pipeline)


def timing(recipe: Recipe, footprint: Footprint, gpus_per_node: int) -> Timing:
    """One iteration, every sequence at its longest. An upper bound of the work; the rates are
    assumed, not measured."""
    batch, gpu = batch_plan(recipe), gpu_of(recipe)
    works: list[Work] = []
    for phase in footprint.phases:
        role = "critic" if phase.name == "group probe" else phase.name.split()[0]
        if phase.name.startswith(("set-up", "group probe", "save")) or "once" in phase.name:
            continue
        if phase.name == "rollout":
            works.append(_rollout(recipe, footprint, phase, batch, gpu))
        elif phase.name.endswith("update"):
            works.append(_update(recipe, footprint, batch, gpu, role, gpus_per_node))
        else:
            works.append(
                _matrix(recipe, gpu, phase.name, 1, 0.0, batch.tokens, batch.scoring_slots)
            )
    moved = sum(
        phase.moved
        for phase in footprint.phases
        if "once" not in phase.name and phase.name != "save"
    )
    return Timing(gpu, tuple(works), moved / HOST_BANDWIDTH)


def peak_rate(recipe: Recipe, gpu: Gpu) -> float:
    """FLOP/s of the layers' matrix products in training and scoring; generation computes in bf16
    always."""
    return gpu.fp8 if recipe.precision.fp8 != "none" and gpu.fp8 else gpu.bf16


def _matrix(
    recipe: Recipe, gpu: Gpu, name: str, count: float, again: float, tokens: int, slots: int
) -> Work:
    """`count` passes over `tokens` tokens, `again` of them a second time, at the assumed share of
    the peak."""
    architecture = recipe.model.architecture
    peak = gpu.bf16 if name == "rollout" else peak_rate(recipe, gpu)
    useful, extra = flops(architecture, tokens, count), flops(architecture, tokens, again)
    seconds = (useful + extra) / (recipe.world * peak * ASSUMED_MFU) * (1 + bubble(recipe, slots))
    return Work(name, useful, extra, seconds)


def _update(
    recipe: Recipe, footprint: Footprint, batch: BatchPlan, gpu: Gpu, role: str, per_node: int
) -> Work:
    a, shard, replicas = recipe.model.architecture, footprint.roles[role], batch.replicas
    feed = 3 * a.hidden_size * a.ffn_hidden_size
    attention = 2 * a.hidden_size * a.head_dim * (a.num_heads + a.num_kv_heads)
    again = {"none": 0.0, "selective": feed / (feed + attention), "full": 1.0}[
        recipe.memory.recompute
    ]
    work = _matrix(
        recipe,
        gpu,
        f"{role} update",
        3 * batch.epochs,
        again * batch.epochs,
        batch.tokens,
        batch.slots,
    )
    one_node = recipe.parallel.pipeline == 1 and recipe.world <= per_node
    link = NVLINK_BANDWIDTH if one_node else NODE_BANDWIDTH
    # gradients scattered, weights gathered
    exchange = (shard.gradients + shard.weights) * (replicas - 1) / replicas / link
    return Work(work.name, work.flops, work.recomputed, work.seconds + batch.updates * exchange)


def _rollout(
    recipe: Recipe, footprint: Footprint, phase: Phase, batch: BatchPlan, gpu: Gpu
) -> Work:
    """Prefill at the assumed share of the peak; each decoded token reads the weights and half-full
    caches, or waits for launches."""
    parallel, shard = recipe.parallel, footprint.roles["actor"]
    prompts = batch.rows * (batch.max_length - batch.max_response)
    prefill = _matrix(recipe, gpu, "rollout", 1, 0.0, prompts, 1)
    launching = shard.layers * (
        DECODE_KERNELS * LAUNCH_SECONDS + (2 * REDUCE_SECONDS if parallel.tensor > 1 else 0.0)
    )
    row = (batch.max_length - batch.max_response / 2) * need_of(slot_of(recipe)).token
    whole, rest = divmod(batch.rows_per_replica, phase.work.rows)
    slices = [phase.work.rows] * whole + [rest] * bool(rest)
    step = sum(max((shard.weights + rows * row) / gpu.bandwidth, launching) for rows in slices)
    decode = flops(recipe.model.architecture, batch.rows * batch.max_response, 1)
    return Work(
        "rollout",
        prefill.flops + decode,
        0.0,
        prefill.seconds + batch.max_response * parallel.pipeline * step,
    )
