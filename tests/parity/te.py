"""Stands in for Transformer Engine's linear layers, which need CUDA: the scaling state of version
2.11 (its module/base.py)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.scaling import Scaling
from gipo_megatron.specs import Precision

ROWS = 4  # of a history; Transformer Engine's has 1024
LARGEST = 448.0  # of e4m3


class FakeLinear(nn.Module):
    """One matrix product's state, as passes write it. Bytes of others are never taken."""

    def __init__(self, config: Any, weight: nn.Parameter) -> None:
        super().__init__()
        self.config, self.weight = config, weight
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = self.fp8_meta_tensors_initialized = False
        self.pickled = 0

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        if self.fp8_meta_tensors_initialized:
            return
        products = self.fp8_meta["num_gemms"]
        for place, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = SimpleNamespace(
                scale=torch.ones(tensors * products),
                amax_history=torch.zeros(ROWS, tensors * products),
            )
            self.fp8_meta[place] = state
        self.quantizer_scale = self.fp8_meta["scaling_fwd"].scale[0]  # a view, as the quantizers'
        self.fp8_meta_tensors_initialized = True

    def reset_fp8_meta_tensors(self) -> None:
        for state in self._states():
            state.scale.fill_(1)
            state.amax_history.zero_()

    def _states(self) -> list[SimpleNamespace]:
        return [
            self.fp8_meta[place]
            for place in ("scaling_fwd", "scaling_bwd")
            if place in self.fp8_meta
        ]

    @torch.no_grad()
    def run(self, enabled: bool, amax: float, training: bool) -> None:
        """A pass of the module."""
        self.fp8 = self.fp8_meta["fp8_checkpoint"] = enabled
        if not enabled:
            return
        self.fp8_meta["num_gemms"] = 1
        self.init_fp8_meta_tensors(None)
        for state in self._states():
            state.amax_history[0].clamp_(min=amax)
        if training:
            self.age()

    @torch.no_grad()
    def age(self) -> None:
        """What leaving the autocast of a training pass does to every module of the process."""
        for state in self._states():
            amax = state.amax_history.amax(0)
            state.scale.copy_(torch.where(amax > 0, LARGEST / amax, state.scale))
            state.amax_history.copy_(state.amax_history.roll(-1, 0))
            state.amax_history[0] = 0

    def get_extra_state(self) -> Tensor:
        """mcore's state dicts call it."""
        if not (self.fp8 or self.fp8_meta["fp8_checkpoint"]):
            return torch.empty(0, dtype=torch.uint8)
        self.pickled += 1
        return as_bytes({"scale_fwd": self.fp8_meta["scaling_fwd"].scale})

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("would unpickle what it is given")


def as_bytes(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def fake_fp8(engine: Engine, amax: Callable[[], float] = lambda: 2.0) -> list[FakeLinear]:
    """A module with delayed scaling in each of the engine's layers, run whenever the layer is."""
    fakes = []
    for chunk in engine.chunks:
        assert chunk.decoder.config is chunk.config
        chunk.config.fp8 = "hybrid"
        for layer in chunk.decoder.layers:
            # a parameter that the layer has already: the model stays as it is
            layer.fake = FakeLinear(chunk.config, layer.pre_mlp_layernorm.weight)
            layer.register_forward_hook(_runner(layer.fake, chunk.config, amax))
            fakes.append(layer.fake)
    engine.scaling = Scaling(engine.chunks, Precision("bf16", "delayed"))
    return fakes


def _runner(fake: FakeLinear, config: Any, amax: Callable[[], float]) -> Callable[..., None]:
    return lambda *_: fake.run(config.fp8 is not None, amax(), training=torch.is_grad_enabled())


def story(fake: FakeLinear) -> tuple[float, list[float]]:
    """The input's scale and history; of a module without state, those of a new one."""
    if not fake.fp8_meta_tensors_initialized:
        return 1.0, [0.0] * ROWS
    state = fake.fp8_meta["scaling_fwd"]
    assert float(fake.quantizer_scale) == float(state.scale[0]), "the quantizer has lost its scale"
    return float(state.scale[0]), state.amax_history[:, 0].tolist()


def numbered(layer: int) -> dict[str, Tensor]:
    """The state that tests give to a layer."""
    return state_of(100.0 + layer, [0.0, layer, 0.0, 7.0])


def state_of(scale: float, history: list[float]) -> dict[str, Tensor]:
    """A module's four tensors, all columns alike."""
    column = torch.tensor(history)[:, None]
    return {
        "scale_fwd": torch.full((3,), scale),
        "amax_history_fwd": column.expand(-1, 3).contiguous(),
        "scale_bwd": torch.full((2,), scale),
        "amax_history_bwd": column.expand(-1, 2).contiguous(),
    }
