"""Floating point operations and time of an iteration: estimates from data-sheet rates and the
assumptions below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gipo_megatron.megatron.meta_shard import Shard
from gipo_megatron.planning.activations import need_of
from gipo_megatron.planning.arithmetic import BATCH, DATASET, Call, Iteration
from gipo_megatron.planning.memory import Footprint, Phase, slot_of
from gipo_megatron.planning.server import server_of
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Parallel, head_of
from gipo_megatron.telemetry.performance import PEAK_FLOPS, flops, num_parameters

# share of the peak in matrix products, forward and backward, tensor parallel traffic included
ASSUMED_MFU = 0.40
DECODE_KERNELS = 22  # a layer of decode.Decoder launches about as many
ADAPTER_KERNELS = 12  # its adapters as many more: two products and a sum for each linear layer
LAUNCH_SECONDS = 5e-6  # of one kernel
GRAPH_SECONDS = 1.5e-6  # of one kernel in a CUDA graph, which a replica of one GPU has
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
    bandwidth: float  # bytes/s of its memory


# By memory in GiB, the only thing that a recipe states; the nearest is taken. 80 GiB is an H100 (an
# A100 of 80 GiB: 312 TFLOP/s, no FP8, 2.04 TB/s).
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


def bubble(recipe: Recipe, slots: int) -> float:
    """Return idle over busy time of a pipeline: (p - 1) / (m v) (Narayanan et al. 2021)."""
    return (recipe.parallel.pipeline - 1) / (slots * recipe.parallel.virtual_pipeline)


def timing(iteration: Iteration, footprint: Footprint, gpus_per_node: int) -> Timing:
    """Estimate one iteration, every sequence at its longest: an upper bound of the work. The rates
    are assumed, not measured."""
    memory = iteration.recipe.hardware.gpu_memory_gib
    gpu = GPUS[min(GPUS, key=lambda size: abs(size - memory))]
    estimates = Estimates(iteration, footprint.roles, gpu, gpus_per_node)
    phases = [phase for phase in footprint.phases if phase.call.rows]  # not set-up and save
    works = [estimates.work(phase) for phase in phases if phase.call.reads == BATCH]
    moved = sum(phase.moved for phase in phases if phase.call.reads != DATASET)
    return Timing(gpu, tuple(works), moved / HOST_BANDWIDTH)


def cut(rows: int, together: int) -> list[int]:
    """Return the slices of rows that are generated one after the other."""
    whole, rest = divmod(rows, together)
    return [together] * whole + [rest] * bool(rest)


def kernel_seconds(parallel: Parallel) -> float:
    """Return the time between two kernels of a decoding step that has no other work."""
    return LAUNCH_SECONDS if parallel.model > 1 else GRAPH_SECONDS


def decode_kernels(recipe: Recipe) -> int:
    """Return the kernels that a layer of the decoder launches."""
    return DECODE_KERNELS + (ADAPTER_KERNELS if recipe.model.adapter.rank else 0)


def peak_rate(recipe: Recipe, gpu: Gpu) -> float:
    """Return the FLOP/s of the layers' matrix products in training and scoring; generation always
    computes in bf16."""
    return gpu.fp8 if recipe.precision.fp8 != "none" and gpu.fp8 else gpu.bf16


@dataclass(frozen=True)
class Estimates:
    """Work and time of phases."""

    iteration: Iteration
    shards: Mapping[str, Shard]
    gpu: Gpu
    gpus_per_node: int

    @property
    def recipe(self) -> Recipe:
        return self.iteration.recipe

    def work(self, phase: Phase) -> Work:
        if phase.call.server is not None:
            return self._served(phase.call)
        if phase.call.verb == "generate":
            return self._rollout(phase)
        call, tokens = phase.call, self.iteration.tokens(phase.call)
        slots, peak = self.iteration.slots_of(call), peak_rate(self.recipe, self.gpu)
        if call.verb == "forward":
            return self._matrix(call.name, tokens, 1, 0.0, slots, peak)
        passes = 2 if self.recipe.model.adapter.rank else 3  # no gradient of a frozen weight
        work = self._matrix(call.name, tokens, passes, self._computed_again(call.role), slots, peak)
        return replace(work, seconds=work.seconds + call.count * self._exchange(call.role))

    def _matrix(
        self, name: str, tokens: int, passes: int, again: float, slots: int, peak: float
    ) -> Work:
        """Return the work of `passes` over `tokens` tokens, `again` of a pass computed a second
        time, at the assumed share of the peak."""
        architecture = self.recipe.model.architecture
        useful, extra = flops(architecture, tokens, passes), flops(architecture, tokens, again)
        busy = (useful + extra) / (self.recipe.world * peak * ASSUMED_MFU)
        return Work(name, useful, extra, busy * (1 + bubble(self.recipe, slots)))

    def _computed_again(self, role: str) -> float:
        """Return the share of a forward pass that the backward pass computes again: in the layers,
        and the logits of a language model."""
        a = self.recipe.model.architecture
        feed = 3 * a.hidden_size * a.ffn_hidden_size
        attention = 2 * a.hidden_size * a.head_dim * (a.num_heads + a.num_kv_heads)
        layer = {"none": 0, "selective": feed, "full": feed + attention}
        again = a.num_layers * layer[self.recipe.memory.recompute]
        if head_of(role) is None:
            again += a.vocab_size * a.hidden_size
        return again / num_parameters(a)

    def _exchange(self, role: str) -> float:
        """Return the seconds in which an optimizer step scatters gradients and gathers weights."""
        parallel, shard = self.recipe.parallel, self.shards[role]
        replicas = self.recipe.data_parallel
        one_node = parallel.pipeline == 1 and self.recipe.world <= self.gpus_per_node
        link = NVLINK_BANDWIDTH if one_node else NODE_BANDWIDTH
        return (shard.gradients + shard.weights) * (replicas - 1) / replicas / link

    def _rollout(self, phase: Phase) -> Work:
        """Return prefill at the assumed share of the peak, and decoding, in which each token reads
        the weights and half-full caches, or waits for launches."""
        call, longest, parallel = phase.call, self.recipe.data.max_length, self.recipe.parallel
        assert call.sampling is not None
        response, shard = call.sampling.max_response, self.shards[call.role]
        prompts = call.sequences * (longest - response)
        prefill = self._matrix(phase.name, prompts, 1, 0.0, 1, self.gpu.bf16)
        kernels = decode_kernels(self.recipe) * kernel_seconds(parallel)
        reduces = 2 * REDUCE_SECONDS if parallel.tensor > 1 else 0.0
        launching = shard.layers * (kernels + reduces)
        token = need_of(slot_of(self.iteration)).token
        slices = cut(self.iteration.rows_per_replica, phase.work.rows)
        step = self._step(slices, shard.weights + shard.base, token, response, launching)
        decode = flops(self.recipe.model.architecture, call.sequences * response, 1)
        seconds = prefill.seconds + response * parallel.pipeline * step
        return Work(phase.name, prefill.flops + decode, 0.0, seconds)

    def _step(
        self, slices: Sequence[int], weights: int, token: int, response: int, launching: float
    ) -> float:
        """Return the seconds in which every slice of rows gets one token."""
        row = (self.recipe.data.max_length - response / 2) * token
        return sum(max((weights + rows * row) / self.gpu.bandwidth, launching) for rows in slices)

    def _served(self, call: Call) -> Work:
        """Return the same estimate for a server's GPUs, which have all rows; without seconds for a
        server that the run does not start: its GPUs are not known."""
        longest, architecture = self.recipe.data.max_length, self.recipe.model.architecture
        assert call.sampling is not None
        response, server = call.sampling.max_response, server_of(self.iteration)
        prefill = flops(architecture, call.sequences * (longest - response), 1)
        work = Work(call.name, flops(architecture, call.sequences * longest, 1), 0.0, 0.0)
        if server is None:
            return work
        reduces = 2 * REDUCE_SECONDS if server.tensor > 1 else 0.0
        launching = architecture.num_layers * (DECODE_KERNELS * GRAPH_SECONDS + reduces)
        slices = cut(self.iteration.rows, server.rows)
        step = self._step(slices, server.weights, server.token, response, launching)
        busy = prefill / (server.tensor * self.gpu.bf16 * ASSUMED_MFU)
        return replace(work, seconds=busy + response * step)
