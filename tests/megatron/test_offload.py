"""Parking and swapping tensors by hand; whole models are in tests/parity/test_training.py."""

from __future__ import annotations

import pytest
import torch

from gipo_megatron.megatron.offload import (
    PIECE_BYTES,
    Residency,
    Shelf,
    host_copies,
    pieces,
    swapped,
)


def test_views_survive_a_stay_on_the_shelf() -> None:
    flat = torch.arange(6.0)
    view = flat[2:4]
    shelf = Shelf(lambda: [flat, view])
    shelf.park()
    assert flat.untyped_storage().size() == 0
    shelf.park()  # parked already
    shelf.restore()
    assert flat.tolist() == [0, 1, 2, 3, 4, 5] and view.tolist() == [2, 3]
    flat[2] = 7
    assert view[0] == 7  # one storage still


def test_host_buffers_are_made_once() -> None:
    """The second stay copies into the first one's; a storage of another size gets its own."""
    tensors = [torch.arange(8.0), torch.arange(5.0)]
    shelf = Shelf(lambda: tensors)

    def stay() -> list[int]:
        shelf.park()
        places = [piece.data_ptr() for item in shelf.parked for piece in item.copy]
        shelf.restore()
        return places

    first = stay()
    tensors[0][3] = 30
    assert stay() == first and len(first) == 2
    assert tensors[0].tolist() == [0, 1, 2, 30, 4, 5, 6, 7] and tensors[1].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    tensors[1].untyped_storage().resize_(32)
    tensors[1] = torch.empty(0).set_(tensors[1].untyped_storage())
    tensors[1].fill_(9)
    again = stay()
    assert again[0] == first[0] and again[1] != first[1]
    assert tensors[1].tolist() == [9] * 8
    tensors.pop()
    stay()
    assert len(shelf.buffers) == 1, "what is gone is not kept"


@pytest.mark.parametrize(
    ("dtype", "numel"),
    [(torch.uint8, 5 * PIECE_BYTES + 3), (torch.float32, PIECE_BYTES + 5), (torch.bfloat16, 77)],
)
def test_pinned_buffers_are_powers_of_two(dtype: torch.dtype, numel: int) -> None:
    """torch's pinned allocator rounds up to them (ATen/core/CachingHostAllocator.h): whole pieces
    lose nothing, the rest under 1 MiB."""
    whole = (torch.arange(numel) % 251).to(dtype)
    parts = pieces([whole])
    assert torch.equal(torch.cat(parts), whole) and parts[0].data_ptr() == whole.data_ptr()
    assert (
        all(part.nbytes.bit_count() == 1 for part in parts[:-1]) and parts[-1].nbytes <= PIECE_BYTES
    )
    pinned = sum(2 ** (part.nbytes - 1).bit_length() for part in parts)
    assert pinned - whole.nbytes < PIECE_BYTES
    assert [part.shape for part in pieces(parts)] == [part.shape for part in parts]


def test_gradients_come_back_as_zeros() -> None:
    gradient = torch.ones(3)
    shelf = Shelf(lambda: [gradient], keep=False)
    shelf.park()
    shelf.restore()
    assert gradient.tolist() == [0, 0, 0]


def test_the_next_model_sends_the_idle_one_away() -> None:
    weights = [torch.arange(4.0), torch.arange(4.0) + 10]
    moments = [w * 2 for w in weights]
    models = [
        Residency("cpu", Shelf(lambda w=w: [w]), (Shelf(lambda m=m: [m]),))
        for w, m in zip(weights, moments, strict=True)
    ]

    def sizes() -> list[int]:
        return [t.untyped_storage().size() for t in (*weights, *moments)]

    assert sizes() == [0, 0, 0, 0]
    with models[0].use():
        assert sizes() == [16, 0, 0, 0]
    assert sizes() == [16, 0, 0, 0]  # nobody needs the room yet
    with models[1].use(training=True), models[1].use():
        assert sizes() == [0, 16, 0, 16]
        with models[0].use():
            assert sizes() == [16, 16, 0, 16]  # in use: stays
    assert weights[1].tolist() == [10, 11, 12, 13] and moments[1].tolist() == [20, 22, 24, 26]


def test_shared_storage_of_weights_and_masters() -> None:
    weight = torch.arange(4.0)
    master = weight[1:3]  # fp32: mcore's master weights are views of the weights
    model = Residency("cpu", Shelf(lambda: [weight]), (Shelf(lambda: [master]),))
    with model.use():
        assert weight.tolist() == [0, 1, 2, 3] and master.tolist() == [1, 2]


def test_swap_comes_back_after_an_error() -> None:
    live = [torch.tensor([1.0, 2.0])]
    other = host_copies([torch.tensor([3.0, 4.0])])
    with pytest.raises(RuntimeError, match="inside"), swapped(live, other):
        assert live[0].tolist() == [3, 4]
        raise RuntimeError("inside")
    assert live[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="laid out"), swapped(live, [torch.zeros(3)]):
        pass


def test_unknown_offload() -> None:
    with pytest.raises(ValueError, match="disk"):
        Residency("disk", Shelf(list), ())
