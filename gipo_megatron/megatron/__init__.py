"""The only code on Megatron-Core: building, splitting, running, training and storing a model."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from gipo_megatron import capabilities, environment
from gipo_megatron.errors import UserError


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Leave Megatron-Core's fused kernels uncompiled where there is no GPU. The import of torch's
    compiler takes half of Megatron-Core's import time."""
    if torch.cuda.is_available():
        yield
        return

    def plain(function: Any = None, **_: Any) -> Any:
        return plain if function is None else function

    compile_ = torch.compile
    torch.compile = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Let Megatron-Core run without an optional package that it imports and that nothing here needs
    of it. None in sys.modules is Python's own mark of a package that cannot be imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


environment.set_defaults()  # for tests and tools; launchers call it before torch is imported

with warnings.catch_warnings(), _no_compiler(), _without("wandb"):
    # Megatron-Core warns of every optional package that is not installed
    warnings.simplefilter("ignore")
    try:
        from gipo_megatron.megatron import fusions

        fusions.provide_extension()
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise UserError(
                "Megatron-Core 0.18 and later import triton, which is not installed",
                where="megatron-core",
                fix="pip install triton, or megatron-core==0.16.1",
            ) from error
        if not capabilities.raised_inside("transformer_engine", error):
            raise
        # Megatron-Core catches a ModuleNotFoundError of Transformer Engine and runs without it, but
        # no other error.
        raise capabilities.broken_transformer_engine(capabilities.one_line(error)) from error
