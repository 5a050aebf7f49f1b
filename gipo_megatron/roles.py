"""The roles an algorithm uses. A role hides where the layers of its model are and how it is
split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from gipo_megatron.specs import Sampling
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import BatchLoss, CriticOutput, Prompts, Rollout, Rows, TokenStats, Update

T = TypeVar("T")


class Trainable(Protocol):
    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        """Make exactly one optimizer step on the sum of all parts' terms, each divided by its
        global unit count."""
        ...


class Actor(Trainable, Protocol):
    @property
    def version(self) -> int:
        """A count that every change of the weights raises; equal on all ranks."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        ...

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout: ...

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats: ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) pairs, for export and for external rollout engines."""
        ...


class Reference(Protocol):
    def logprobs(self, batch: Rows) -> TokenStats: ...


class Critic(Trainable, Protocol):
    def evaluate(self, batch: Rows) -> CriticOutput: ...


class RewardModel(Trainable, Protocol):
    def score(self, batch: Rows) -> Tensor:
        """[B], read at each sequence's last token."""
        ...

    def features(self, batch: Rows, position: str) -> Tensor:
        """Return the trunk's last hidden state [B, H], without gradient, at the last prompt token
        (position "prompt") or at the last token ("trajectory")."""
        ...


class DataParallel(Protocol):
    """The replicas. Global row i of a batch is row i // size of replica i % size."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor: ...

    def max(self, x: Tensor) -> Tensor: ...


class World(Protocol):
    """All ranks. Each replica has one or more of them."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        ...

    @property
    def replica(self) -> int:
        """The index of this rank's replica; rank 0 is in replica 0."""
        ...

    def from_main(self, action: Callable[[], T]) -> T:
        """Return what rank 0's `action` returns, on every rank; a UserError that it raises is
        raised on every rank. Collective; the action may take any time."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return every replica's value, replica r's at r, on every rank. Collective."""
        ...


class HeldOut(Protocol):
    """Rows held back from training."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def gold(self) -> Callable[[str, str], float] | None:
        """(prompt, response) -> true reward, where the data define one."""
        ...

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield (this replica's rows, weights [b]); rows are of the algorithm's `data` kind, weight
        0 marks padding."""
        ...


@runtime_checkable
class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SingleReplica:
    """Data parallel of size one: every reduction is the identity."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x


def gather_rows(x: Tensor, dp: DataParallel) -> Tensor:
    """[b] of every replica -> [N] in global order (row i of replica r is global row i * size + r).
    Needs equal b everywhere."""
    whole = torch.zeros(len(x), dp.size, dtype=torch.float64, device=x.device)
    whole[:, dp.rank] = x.double()
    return dp.sum(whole).flatten()
