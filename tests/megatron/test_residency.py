"""Parking and swapping tensors by hand; whole models are in tests/parity/test_training.py."""

from __future__ import annotations

import pytest
import torch

from gipo_megatron.megatron.residency import Residency, Shelf, host_copies, swapped


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


def test_gradients_come_back_as_zeros() -> None:
    gradient = torch.ones(3)
    shelf = Shelf(lambda: [gradient], keep=False)
    shelf.park()
    shelf.restore()
    assert gradient.tolist() == [0, 0, 0]


def test_the_next_model_sends_the_idle_one_away() -> None:
    weights = [torch.arange(4.0), torch.arange(4.0) + 10]
    moments = [w * 2 for w in weights]
    models = [Residency("cpu", Shelf(lambda w=w: [w]), (Shelf(lambda m=m: [m]),)) for w, m in zip(weights, moments, strict=True)]

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
