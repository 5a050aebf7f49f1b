from __future__ import annotations

import pytest
import torch

from gipo_megatron.megatron.param_sharding import Placement


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("place", "shape"),
    [
        (Placement("a", 0), (8, 3)),
        (Placement("b", 1), (3, 8)),
        (Placement("c", 0, 2), (16, 3)),
        (Placement("d"), (5,)),
    ],
)
def test_join_undoes_take(place: Placement, shape: tuple[int, ...], size: int) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    local = list(shape)
    if place.dim is not None:
        local[place.dim] //= size
    parts = [place.take(full, rank, torch.empty(local), size) for rank in range(size)]
    assert all(list(part.shape) == local for part in parts)
    assert torch.equal(place.join(parts), full)
    assert place.full_shape(torch.empty(local), size) == shape


def test_gate_and_up_are_cut_one_by_one() -> None:
    full = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23])  # gate 1x, up 2x
    assert Placement("fc1", 0, 2).take(full, 1, torch.empty(4), 2).tolist() == [12, 13, 22, 23]


def test_vocabulary_rows_are_padded_with_zeros_and_trimmed_again() -> None:
    place, full = Placement("embedding", 0, rows=5), torch.arange(1, 6).view(5, 1)
    parts = [place.take(full, rank, torch.empty(2, 1), 4) for rank in range(4)]
    assert [p.flatten().tolist() for p in parts] == [[1, 2], [3, 4], [5, 0], [0, 0]]
    assert torch.equal(place.join(parts), full)
    assert place.full_shape(torch.empty(2, 1), 4) == (5, 1)
