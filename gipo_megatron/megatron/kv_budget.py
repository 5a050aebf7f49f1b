"""How many prompts generate at once: the memory that a device has left, over what a row's cache and
its logits take of it.

    a GPU    state of the models │ work on a block of prompts │ rows: keys and values, logits │ 5 %

Generation with larger slices takes fewer steps, so on a GPU it takes all that is free. The planner
uses the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.sampling import pick_bytes
from gipo_megatron.specs import Architecture, Parallel, Sampling

PREFILL_TOKENS = 8192  # of one block of prompts; bounds its activations
# of a GPU's memory: what the caching allocator cannot hand out, and what NCCL allocates late,
# outside it
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Need:
    """Bytes that generation takes on one rank of a replica: on the one that needs most, so that all
    cut the batch alike."""

    architecture: Architecture
    parallel: Parallel
    itemsize: int  # of the model's dtype

    @property
    def layers(self) -> int:
        return -(-self.architecture.num_layers // self.parallel.pipeline)

    @property
    def token(self) -> int:
        """Keys and values of one token."""
        a = self.architecture
        return (
            2 * self.layers * (a.num_kv_heads // self.parallel.tensor) * a.head_dim * self.itemsize
        )

    def prefill(self, tokens: int) -> int:
        """At work in one layer of decode.Decoder on a block of prompts, in its attention or, with
        what that leaves, its feed-forward part.

        Three residual streams; of attention RoPE's temporaries, then the fused projection, rotated
        queries and keys, and the output.
        """
        a, tensor = self.architecture, self.parallel.tensor
        query, key = (heads * a.head_dim // tensor for heads in (a.num_heads, a.num_kv_heads))
        feed = a.ffn_hidden_size // tensor
        return (
            tokens
            * self.itemsize
            * (3 * a.hidden_size + max(5 * query + 6 * key, 3 * (query + key + feed)))
        )

    def logits(self, sampling: Sampling) -> int:
        """One row's in a step: gathered and joined in the model's dtype, then what drawing a token
        makes of them."""
        return self.architecture.vocab_size * (2 * self.itemsize + pick_bytes(sampling))


@dataclass(frozen=True)
class Room:
    """Bytes that rows which generate at once may fill on each rank, and how many of them a row
    takes beside its cache."""

    size: int
    row: int = 0

    def rows(self, slots: int, token: int) -> int:
        """As many rows of `slots` tokens as fit, one at least."""
        return max(1, self.size // (slots * token + self.row))


HOST_ROOM = Room(4 * 2**30)  # of caches on a CPU, whose memory is not ours alone


def room_in(free: int, total: int, need: Need, prompt: int, sampling: Sampling) -> Room:
    """The room in a GPU with `free` of `total` bytes left, for prompts of at most `prompt` tokens.

    One of the cache's tensors is there twice while finished rows leave it (decode.Cache.keep).
    """
    spare = free - int(FRAGMENTATION * total) - need.prefill(max(PREFILL_TOKENS, prompt))
    tensors = 2 * need.layers
    return Room(max(0, spare) * tensors // (tensors + 1), need.logits(sampling))


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """(bytes free, bytes in all) of a GPU; free is also what torch's allocator holds and does not
    use. None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def find_room(mesh: Mesh, need: Need, prompt: int, sampling: Sampling) -> Room:
    """The room on the rank of this replica that has least of it. Collective on a GPU; on a CPU a
    fixed size."""
    memory = free_memory(mesh.device)
    if memory is None:
        return HOST_ROOM
    mine = room_in(*memory, need, prompt, sampling)
    size = torch.tensor(mine.size, device=mesh.device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN, group=mesh.model_group)
    return replace(mine, size=int(size))
