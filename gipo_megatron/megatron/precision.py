"""Number formats: a recipe's dtype and FP8 recipe as fields of mcore's TransformerConfig, and the scaling state that FP8 keeps.

FP8 is for the matrix products of the transformer layers in the training forward and backward: mcore enters Transformer Engine's autocast
around the layers only, so embeddings, the output layer, heads and log-probs stay in bf16 or fp32. Generation (decode.py) reads the bf16
weights and never enters it.

tensorwise and blockwise take each tensor's scale from the tensor itself. `delayed` takes it from the largest values of earlier passes,
which is state beside the weights; Transformer Engine 2.11 keeps it so:

    a pass writes its largest values (amax) into row 0 of a history, also under no_grad: an inference pass would count in the next scale;
    a training pass, when it leaves the autocast, turns rows into scales and ages the histories of *all* models of this process;
    a model that never trained has scale 1: weights of size 0.02 then lie where e4m3 has one or two bits.

So `Scaling` puts the state back after every forward-only pass, and runs a model that has none in bf16.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor, nn
from torch.distributed import checkpoint as torch_checkpoint

from gipo_megatron import capabilities
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.layout import unwrap
from gipo_megatron.specs import Architecture, Parallel, Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fp16 only for conversion: recipes refuse it
FP8_RECIPES = {"delayed": Fp8Recipe.delayed, "tensorwise": Fp8Recipe.tensorwise, "blockwise": Fp8Recipe.blockwise}
FP8_ROWS = 16  # sequence × batch must divide by this in an FP8 matrix product; a multiple of the length alone always does
EXTRA_STATE = "_extra_state"

ScalingState = dict[str, Tensor]  # "chunk.module" -> the bytes that Transformer Engine makes of the module's scales and histories


def transformer_engine_usable() -> bool:
    """Transformer Engine is installed and there is a CUDA device to run it on.

    Raises UserError where it is installed there and does not import: Megatron-Core would build its layers from mocks.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    if not HAVE_TE:
        failure = capabilities.transformer_engine_failure()
        raise capabilities.broken_transformer_engine(failure.reason if failure else "Megatron-Core could not import it")
    return True


def torch_dtype(precision: Precision) -> torch.dtype:
    """Raises UserError for an unknown dtype."""
    if precision.dtype not in DTYPES:
        raise UserError(f"unknown precision {precision.dtype!r}", where="precision.dtype", fix=f"one of {', '.join(DTYPES)}")
    return DTYPES[precision.dtype]


def check(precision: Precision, here: capabilities.Capabilities | None = None) -> None:
    """Raises UserError for an unknown name, for FP8 without bf16, and for FP8 that this machine (`here`: another) cannot run.

    On this machine also for a Transformer Engine that does not import, where layers in bf16 would be made of it.
    """
    torch_dtype(precision)
    if here is None and precision.dtype == "bf16":
        transformer_engine_usable()
    if precision.fp8 == "none":
        return
    if precision.fp8 not in FP8_RECIPES:
        known = f"one of none, {', '.join(FP8_RECIPES)}"
        raise UserError(f"unknown FP8 recipe {precision.fp8!r}", where="precision.fp8", fix=known)
    if precision.dtype != "bf16":
        raise UserError(f"FP8 needs bf16 around it, not {precision.dtype}", where="precision.dtype", fix="set precision.dtype to bf16")
    capabilities.check_fp8(precision.fp8, here or capabilities.probe())


def check_widths(precision: Precision, architecture: Architecture, parallel: Parallel) -> None:
    """Raises UserError when a weight of one tensor rank has a side that is no multiple of 16, as Transformer Engine wants it."""
    if precision.fp8 == "none":
        return
    a, tensor = architecture, parallel.tensor
    for size, what in (
        (a.hidden_size, "hidden_size"),
        (a.ffn_hidden_size // tensor, f"ffn_hidden_size {a.ffn_hidden_size} / tensor {tensor}"),
        (a.num_heads * a.head_dim // tensor, f"num_heads {a.num_heads} × head_dim {a.head_dim} / tensor {tensor}"),
        ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim // tensor, f"query, key and value rows / tensor {tensor}"),
    ):
        if size % FP8_ROWS:
            fix = "set precision.fp8 to none, or another parallel.tensor"
            raise UserError(f"FP8 needs widths that divide by {FP8_ROWS}; {what} is {size}", where="precision.fp8", fix=fix)


def config_fields(precision: Precision) -> dict[str, Any]:
    """Fields of TransformerConfig: one dtype for weights, activations and messages between stages; FP8 is e4m3 forward, e5m2 gradients."""
    dtype = torch_dtype(precision)
    fields: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype is torch.bfloat16}
    if precision.deterministic and torch.cuda.is_available():  # on the CPU it would only change the order of the embedding's sums
        fields["deterministic_mode"] = True
    if precision.fp8 != "none":
        fields |= {"fp8": "hybrid", "fp8_recipe": FP8_RECIPES[precision.fp8]}
        # FP8 copies of the weights are made anew in each micro-batch: none to go stale in a swap, none left behind by a parked model
        fields["disable_parameter_transpose_cache"] = True
        if precision.fp8 == "delayed":
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def length_multiple(precision: Precision, parallel: Parallel) -> int:
    """What a micro-batch's padded length must divide by: the tensor size under sequence parallel, 16 in FP8 (per rank), else 1."""
    shards = parallel.tensor if parallel.sequence else 1
    return math.lcm(shards, FP8_ROWS * shards) if precision.fp8 != "none" else shards


# ------------------------------------------------------------------------------------------------- delayed scaling


class Scaling:
    """The FP8 scaling state of one model: changed by its training and by loading, by nothing else. Without delayed scaling it does nothing.

    trained: False for a model that only answers. Its state is pinned: other models' training would age it, and bring nothing new.
    """

    def __init__(self, chunks: Sequence[nn.Module], precision: Precision, trained: bool) -> None:
        self.chunks, self.trained = chunks, trained
        self.active = precision.fp8 == "delayed"
        self._pinned: ScalingState | None = None

    def read(self) -> ScalingState:
        """A copy, on the host; empty for a model that never trained in FP8."""
        found: ScalingState = {}
        for i, chunk in enumerate(self.chunks if self.active else ()):
            for name, module in unwrap(chunk).named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    state: Any = module.get_extra_state()  # None: mcore's own layers; an empty tensor: Transformer Engine's without FP8
                    if isinstance(state, Tensor) and state.numel():
                        found[f"{i}.{name}"] = state
        return found

    def write(self, state: ScalingState) -> None:
        """The modules have `state`, and those that it does not name none."""
        for name in self.read().keys() - state.keys():
            _forget(self._module(name))
        for name, value in state.items():
            self._module(name).set_extra_state(value)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """For forward-only passes: the state as training left it, and left as it was; bf16 where there is none."""
        if not self.active:
            yield
            return
        if self._pinned is not None:
            self.write(self._pinned)
        state = self.read()
        if not self.trained:
            self._pinned = state
        if not state:
            with _bf16(self.chunks):
                yield
            return
        try:
            yield
        finally:
            self.write(state)

    @contextmanager
    def swapped(self, other: ScalingState) -> Iterator[None]:
        """`other` in this one's place; its own comes back, whatever happened."""
        own, pinned = self.read(), self._pinned
        self.write(other)
        self._pinned = None
        try:
            yield
        finally:
            self.write(own)
            self._pinned = pinned

    def _module(self, name: str) -> nn.Module:
        chunk, path = name.split(".", 1)
        return unwrap(self.chunks[int(chunk)]).get_submodule(path)


def _forget(module: nn.Module) -> None:
    """As before its first FP8 pass. `set_extra_state` ignores an empty state, so this turns the switches that a bf16 pass turns."""
    te: Any = module
    te.reset_fp8_meta_tensors()  # scales 1, histories 0
    te.fp8_meta["fp8_checkpoint"] = te.fp8 = te.fp8_calibration = False


@contextmanager
def _bf16(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """mcore's blocks read config.fp8 in each pass."""
    configs: list[Any] = [unwrap(chunk).decoder.config for chunk in chunks]
    before = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, before, strict=True):
            config.fp8 = fp8


def keep_scaling(part: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """A chunk's sharded state dict without extra states, unless delayed scaling needs them: the others' say nothing."""
    return part if precision.fp8 == "delayed" else {key: value for key, value in part.items() if not key.endswith(EXTRA_STATE)}


def stored_only(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A chunk's sharded state dict without extra states that the checkpoint in `folder` has not: it was trained without delayed scaling."""
    stored = torch_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {k: v for k, v in part.items() if not (isinstance(v, ShardedObject) and k.endswith(EXTRA_STATE)) or v.unique_key in stored}
