from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from gipo_megatron.roles import SingleReplica
from gipo_megatron.training.held_out import HeldOut


class Rows:
    """100 rows: the first half of one source, the second half of another."""

    kind = "prompt"

    def __len__(self) -> int:
        return 100

    def prompts_at(self, indices: Sequence[int], rank: int, size: int) -> Any:
        return list(indices), torch.ones(len(indices))

    pairs_at = examples_at = prompts_at


def test_every_batch_is_spread_over_the_sources() -> None:
    """The KL to the reference is measured on the first batch alone."""
    for rows, batch in ((100, 32), (50, 16), (7, 3), (40, 64)):
        held_out = HeldOut(Rows(), SingleReplica(), rows, batch)  # type: ignore[arg-type]
        batches = [some for some, _ in held_out.batches()]
        assert sorted(chain(*batches)) == held_out.indices and len(held_out.indices) == rows
        assert len(batches) == -(-rows // batch) and max(map(len, batches)) <= batch
        for some in batches:
            first = sum(index < 50 for index in some)
            assert abs(first - len(some) / 2) <= 1
    assert not list(HeldOut(Rows(), SingleReplica(), 0, 8).batches())  # type: ignore[arg-type]
