"""torch, imported when it is first used."""

from __future__ import annotations

import torch

from gipo_megatron import tensors


def test_both_names_are_torchs() -> None:
    assert tensors.torch.ones is torch.ones and tensors.torch.nn.Linear is torch.nn.Linear
    parameter = torch.nn.Parameter(torch.ones(1))
    assert isinstance(parameter, tensors.Tensor) and isinstance(1, (int, tensors.Tensor))
    assert not isinstance([1.0], tensors.Tensor) and not isinstance(torch.Tensor, tensors.Tensor)
    assert not hasattr(tensors.torch, "no_such_name")
