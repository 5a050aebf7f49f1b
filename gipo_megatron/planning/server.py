"""The server that a run starts for its rollouts: bytes on each of its GPUs.

    a GPU of the server    weights / t │ CUDA, NCCL │ work on a block of prompts │ keys and values

t: serve.tensor_parallel. vLLM takes the share serve.gpu_memory of the GPU when it starts, and keeps
as many keys and values as fit. It runs on rank 0's machine: on the first t GPUs, or on those that
serve.devices lists, which training may have or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from gipo_megatron.megatron.kv_budget import PREFILL_TOKENS, Need
from gipo_megatron.megatron.precision import DTYPES
from gipo_megatron.planning.activations import Pass
from gipo_megatron.planning.arithmetic import Iteration
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.serving.client import CONNECTIONS
from gipo_megatron.specs import Architecture, Parallel, Serve
from gipo_megatron.telemetry.performance import num_parameters

GIB = 2**30
CONTEXT_BYTES = 2 * GIB  # CUDA context, kernels, NCCL's buffers of a process; CUDA graphs


@dataclass(frozen=True)
class Server:
    """A server of a recipe for GPUs."""

    serve: Serve
    architecture: Architecture
    itemsize: int  # of the weights' dtype, which the server has, too
    gpu: int  # bytes of a GPU
    longest: int  # tokens of the longest row
    ranks: int  # of training on its machine

    @property
    def tensor(self) -> int:
        return self.serve.tensor_parallel

    @property
    def shared(self) -> bool:
        """Return whether training has one of its GPUs, too."""
        return self.beside(range(self.ranks)) > 0

    @property
    def share(self) -> int:
        return int(self.serve.gpu_memory * self.gpu)

    @property
    def weights(self) -> int:
        return num_parameters(self.architecture) * self.itemsize // self.tensor

    @property
    def token(self) -> int:
        """Keys and values of one token; where there are fewer heads than GPUs, some have the
        same."""
        a = self.architecture
        heads = max(1, a.num_kv_heads // self.tensor)
        return 2 * a.num_layers * heads * a.head_dim * self.itemsize

    @property
    def fixed(self) -> int:
        """Bytes of everything but keys and values."""
        need = Need(self.architecture, Parallel(tensor=self.tensor), self.itemsize)
        return self.weights + CONTEXT_BYTES + need.prefill(PREFILL_TOKENS["cuda"])

    @property
    def least(self) -> int:
        """Bytes of the smallest share with which it starts: one row at its longest fits."""
        return self.fixed + self.longest * self.token

    @property
    def fits(self) -> bool:
        return self.least <= self.share

    @property
    def rows(self) -> int:
        """Return how many rows at their longest are generated at once."""
        fit = (self.share - self.fixed) // (self.longest * self.token)
        return min(max(1, fit), CONNECTIONS)

    def beside(self, ranks: range) -> int:
        """Return the bytes that it takes on the GPU of one of these ranks."""
        near = {str(rank) for rank in ranks if rank < self.ranks}
        return 0 if near.isdisjoint(self.serve.gpus) else self.share


def server_of(iteration: Iteration) -> Server | None:
    """Return the server that a run starts; None without one, and on a CPU."""
    recipe = iteration.recipe
    samplers = [call.server for call in iteration.calls if call.server is not None]
    if not samplers or samplers[0].url or not recipe.hardware.gpu_memory_gib:
        return None
    return Server(
        samplers[0].serve,
        recipe.model.architecture,
        DTYPES[recipe.precision.dtype].itemsize,
        recipe.hardware.gpu_memory_gib * GIB,
        recipe.data.max_length,
        min(recipe.world, recipe.hardware.per_node),
    )


def push(recipe: Recipe) -> Pass:
    """Return the bytes of a push of the weights: the largest tensor, whole, and its parts."""
    a = recipe.model.architecture
    rows = max(a.vocab_size, 2 * a.ffn_hidden_size)
    return Pass(layer=2 * rows * a.hidden_size * DTYPES[recipe.precision.dtype].itemsize)
