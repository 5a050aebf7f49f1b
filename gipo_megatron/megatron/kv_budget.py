"""Number of prompts that generate at once: the free memory of a device, divided by the memory of a
row's cache and logits.

    a GPU    state of the models │ work on a block of prompts │ rows: keys and values, logits │ 5 %

Larger slices need fewer steps, so generation on a GPU uses all free memory. The cache has a slot
for each token of the longest row, which no step reads beyond. The planner uses the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.sampling import pick_bytes
from gipo_megatron.specs import Architecture, Parallel, Sampling

# of one block of prompts; bounds its activations. On a CPU, where a short block is as fast, prompts
# of similar length share one
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
# share of a GPU's memory for the allocator's fragments and for NCCL's late buffers outside it
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Need:
    """Bytes that generation needs on the rank of a replica that needs most, so that all ranks cut
    the batch equally."""

    architecture: Architecture
    parallel: Parallel
    itemsize: int  # of the model's dtype

    @property
    def layers(self) -> int:
        return -(-self.architecture.num_layers // self.parallel.pipeline)

    @property
    def token(self) -> int:
        """Keys and values of one token."""
        heads = self.architecture.num_kv_heads // self.parallel.tensor
        return 2 * self.layers * heads * self.architecture.head_dim * self.itemsize

    def prefill(self, tokens: int) -> int:
        """Temporaries of one layer of decode.Decoder on a block of prompts: in its attention, or in
        its feed-forward part beside what attention leaves.

        Per token: three residual streams; in attention RoPE's temporaries, the fused projection,
        rotated queries and keys, and the output.
        """
        a, tensor = self.architecture, self.parallel.tensor
        query, key = (heads * a.head_dim // tensor for heads in (a.num_heads, a.num_kv_heads))
        feed = a.ffn_hidden_size // tensor
        elements = 3 * a.hidden_size + max(5 * query + 6 * key, 3 * (query + key + feed))
        return tokens * self.itemsize * elements

    def logits(self, sampling: Sampling) -> int:
        """Logits of one row in a step: parts and whole in the model's dtype, then the copies that
        drawing a token makes."""
        return self.architecture.vocab_size * (2 * self.itemsize + pick_bytes(sampling))


@dataclass(frozen=True)
class Room:
    """Bytes that the rows of a slice may fill on each rank, and the bytes of a row beside its
    cache."""

    size: int
    row: int = 0

    def rows(self, slots: int, token: int) -> int:
        """Return how many rows of `slots` tokens fit, one at least."""
        return max(1, self.size // (slots * token + self.row))


HOST_ROOM = Room(4 * 2**30)  # on a CPU, whose memory other processes use, too


def room_in(free: int, total: int, need: Need, prompt: int, sampling: Sampling) -> Room:
    """Return the room in a GPU with `free` of `total` bytes, for prompts up to `prompt` tokens.

    One tensor of the cache exists twice at most, while rows move (decode_loop.Loop). CUDA graphs
    have memory of their own: where there are some, logits exist twice.
    """
    prefill = need.prefill(max(PREFILL_TOKENS["cuda"], prompt))
    spare = free - int(FRAGMENTATION * total) - prefill
    tensors = 2 * need.layers
    row = need.logits(sampling) * (2 if need.parallel.model == 1 else 1)
    return Room(max(0, spare) * tensors // (tensors + 1), row)


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Return (free bytes, all bytes) of a GPU, where unused memory of torch's allocator is free.
    None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def find_room(mesh: Mesh, need: Need, prompt: int, sampling: Sampling) -> Room:
    """Return the smallest room of this replica's ranks; on a CPU a fixed size. Collective on a
    GPU."""
    memory = free_memory(mesh.device)
    if memory is None:
        return HOST_ROOM
    mine = room_in(*memory, need, prompt, sampling)
    size = torch.tensor(mine.size, device=mesh.device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN, group=mesh.model_group)
    return replace(mine, size=int(size))
