"""The state of FP8's delayed scaling beside the weights: reading, writing, keeping and storing its
four tensors per matrix product.

Delayed scaling takes a tensor's scale from the largest values (amax) of earlier passes. Transformer
Engine 2.11 keeps in each module, in fp8_meta["scaling_fwd"] for input, weight and output, and in
fp8_meta["scaling_bwd"] for the gradients,

    scale         fp32 [n]       n = 3 forward, 2 backward, times the module's matrix products
    amax_history  fp32 [1024, n] row 0 is the current pass

- A pass writes its largest values into row 0, also under no_grad, so an inference pass would change
  the next scale.
- A training pass, at the end of its autocast, turns rows into scales and shifts the histories of
  *all* models of this process.
- A model that never trained has scale 1, where e4m3 has one or two bits for weights of size 0.02.

So `Scaling` copies the state after training has changed it, restores the copy around every other
pass, and runs a model without state in bf16. It copies into the existing tensors, because the
quantizers hold views of them. Transformer Engine's own extra state is a pickle, which can run code
when it is read. Here the tensors are stored as tensors, and such pickles are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.param_sharding import unwrap
from gipo_megatron.megatron.stored import read_index
from gipo_megatron.specs import Precision

EXTRA_STATE = "_extra_state"  # the name of a module's extra state in mcore's state dicts
FORWARD_TENSORS = 3  # input, weight, output of one matrix product
# name in a checkpoint -> (Transformer Engine's key, its attribute there)
FIELDS = {
    "scale_fwd": ("scaling_fwd", "scale"),
    "amax_history_fwd": ("scaling_fwd", "amax_history"),
    "scale_bwd": ("scaling_bwd", "scale"),
    "amax_history_bwd": ("scaling_bwd", "amax_history"),
}

# "chunk.module" -> the four tensors, by the names of FIELDS
ScalingState = dict[str, dict[str, Tensor]]


class Scaling:
    """The FP8 scaling state of one model, which only its training and loading change. Without
    delayed scaling it does nothing.

    A copy of that state is kept on the device. The changes of all other passes, also of other
    models, are undone from it.
    """

    def __init__(self, chunks: Sequence[nn.Module], precision: Precision) -> None:
        self.chunks = chunks
        self.active = precision.fp8 == "delayed"
        self._modules = _scaled_modules(chunks) if self.active else {}
        self._kept: ScalingState | None = None

    def read(self) -> ScalingState:
        """Return the state after training or loading, on the modules' device; empty for a model
        that never trained in FP8."""
        return self._kept if self._kept is not None else self.live()

    def live(self) -> ScalingState:
        """Return a copy of the modules' present state."""
        state: ScalingState = {}
        for name, module in self._modules.items():
            if tensors := _tensors(module):
                state[name] = {field: t.clone() for field, t in tensors.items()}
        return state

    @torch.no_grad()
    def write(self, state: ScalingState) -> None:
        """Give the modules `state`, and no state to those that it does not name."""
        self._kept = None
        for name, module in self._modules.items():
            if name in state:
                _set(module, state[name])
            elif _tensors(module):
                _forget(module)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Hold during the model's own training passes, which continue from the state of the last
        ones and change it."""
        self._undo()
        self._kept = None
        yield
        self._kept = self.live()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Hold during forward-only passes: they use the state after training and do not change it;
        bf16 where there is none."""
        if not self.active:
            yield
            return
        self._undo()
        self._kept = self.read()
        if not self._kept:
            with _bf16(self.chunks):
                yield
            return
        try:
            yield
        finally:
            self._undo()

    @contextmanager
    def swapped(self, other: ScalingState) -> Iterator[None]:
        """Use `other` inside, and the own state again afterwards, also after an error."""
        own, kept = self.read(), self._kept
        self.write(other)
        try:
            yield
        finally:
            self.write(own)
            self._kept = kept

    @torch.no_grad()
    def _undo(self) -> None:
        """Restore the kept copy into the modules. No value is read on the host, so no pass waits
        for the device."""
        live: list[Tensor] = []
        kept: list[Tensor] = []
        for name, tensors in (self._kept or {}).items():
            live += _tensors(self._modules[name]).values()
            kept += tensors.values()
        if live:
            torch._foreach_copy_(live, kept)

    # ---------------------------------------------------------------------------------- checkpoints

    def to_save(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, ShardedTensor]]:
        """Return the state as sharded tensors. The extra states in `parts`, the chunks' sharded
        state dicts, give each module's place."""
        state = self.read()
        return {
            name: {f: _sharded(place, f, state[name][f]) for f in FIELDS}
            for name, place in self._places(parts)
            if name in state
        }

    def to_load(
        self, parts: Sequence[Mapping[str, Any]], folder: Path
    ) -> dict[str, dict[str, ShardedTensor]]:
        """Return empty sharded tensors for the state in the checkpoint `folder`; none where it was
        trained without delayed scaling.

        Raises UserError when it has Transformer Engine's pickles instead.
        """
        if not self.active:
            return {}
        stored = read_index(folder).state_dict_metadata
        if any(EXTRA_STATE in key for key in stored):
            raise UserError(
                "the checkpoint has FP8 scaling state as pickles of Transformer Engine, which can"
                " run code and are not read",
                where=str(folder),
                fix="set precision.fp8 to tensorwise, which needs no scaling state",
            )
        empty: dict[str, dict[str, ShardedTensor]] = {}
        for name, place in self._places(parts):
            axes = len(place.global_shape)
            for field in FIELDS:
                found: Any = stored.get(_key(place, field))
                if found is not None:
                    tensor = _sharded(place, field, torch.empty(found.size[axes:]))
                    empty.setdefault(name, {})[field] = tensor
        return empty

    def _places(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ShardedObject]]:
        for name in self._modules:
            chunk, path = name.split(".", 1)
            yield name, parts[int(chunk)][f"{path}.{EXTRA_STATE}"]


def without_extra_states(chunks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the weights alone of the chunks' sharded state dicts."""
    return {
        name: {key: value for key, value in part.items() if not key.endswith(EXTRA_STATE)}
        for name, part in chunks.items()
    }


def _key(place: ShardedObject, field: str) -> str:
    return f"{place.key.removesuffix(EXTRA_STATE)}fp8.{field}"


def _sharded(place: ShardedObject, field: str, data: Tensor) -> ShardedTensor:
    """Place `data` where mcore has the module's extra state: at its layer of all layers. Tensor
    ranks and replicas share amax, so one is stored."""
    places = enumerate(zip(place.global_offset, place.global_shape, strict=True))
    offsets = [(axis, offset, size) for axis, (offset, size) in places]
    return ShardedTensor.from_rank_offsets(
        _key(place, field),
        data,
        *offsets,
        replica_id=place.replica_id,
        prepend_axis_num=len(offsets),
    )


# --------------------------------------------------------------------- Transformer Engine's modules


def _scaled_modules(chunks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return {"chunk.module": module} for modules with `fp8_meta` and weights. Attention has
    `fp8_meta`, too, but no weights: it computes in bf16."""
    return {
        f"{i}.{name}": module
        for i, chunk in enumerate(chunks)
        for name, module in unwrap(chunk).named_modules()
        if "fp8_meta" in vars(module) and list(module.parameters(recurse=False))
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors, by the names of FIELDS; none before the first FP8 pass, by
    Transformer Engine's own switches."""
    te: Any = module
    if not (te.fp8_meta["fp8_checkpoint"] or te.fp8 or te.fp8_calibration):
        return {}
    return {field: getattr(te.fp8_meta[key], name) for field, (key, name) in FIELDS.items()}


def _set(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    te: Any = module
    # before its first pass in FP8: make the tensors as that pass would
    if not te.fp8_meta_tensors_initialized:
        te.fp8_meta["recipe"] = get_fp8_recipe(te.config)
        te.fp8_meta["num_gemms"] = saved["scale_fwd"].numel() // FORWARD_TENSORS
        te.init_fp8_meta_tensors(te.fp8_meta["recipe"])
    te.fp8_meta["fp8_checkpoint"] = True
    for field, tensor in _tensors(module).items():
        tensor.copy_(saved[field], non_blocking=True)


def _forget(module: nn.Module) -> None:
    """Reset to before the first FP8 pass."""
    te: Any = module
    te.reset_fp8_meta_tensors()  # scales 1, histories 0
    te.fp8_meta["fp8_checkpoint"] = te.fp8 = te.fp8_calibration = False


@contextmanager
def _bf16(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Run in bf16 inside: mcore's blocks read config.fp8 in each pass."""
    configs: list[Any] = [unwrap(chunk).decoder.config for chunk in chunks]
    before = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, before, strict=True):
            config.fp8 = fp8
