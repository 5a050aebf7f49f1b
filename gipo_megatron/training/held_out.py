"""The held-out rows that a page evaluates during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gipo_megatron.data.batching import Dataset
from gipo_megatron.roles import DataParallel


@dataclass
class HeldOut:
    """`rows` held-out rows, evenly spread over all of them (files hold one source after the other),
    at most `batch` at a time, and each batch is spread as evenly: the KL is that of the first.

    Both counts are global. A batch is padded with rows that do not count.
    """

    data: Dataset
    dp: DataParallel
    rows: int
    batch: int

    @property
    def sources(self) -> tuple[str, ...]:
        return self.data.sources

    @property
    def gold(self) -> Callable[[str, str], float] | None:
        """(prompt, response) -> true reward, where the data define one."""
        return self.data.gold

    @property
    def indices(self) -> list[int]:
        count = min(self.rows, len(self.data))
        return [i * len(self.data) // count for i in range(count)]

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield (rows of this replica, float weights [b]: 0 for padding)."""
        data, indices = self.data, self.indices
        at = {"sft": data.examples_at, "preference": data.pairs_at, "prompt": data.prompts_at}
        count = -(-len(indices) // self.batch)
        for first in range(count):
            rows, valid = at[data.kind](indices[first::count], self.dp.rank, self.dp.size)
            yield rows, valid.double()
