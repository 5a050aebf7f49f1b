"""Everything that knows Megatron-Core: where layers live, how a model is split, run, trained and
stored."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from gipo_megatron import capabilities, environment


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Leave Megatron-Core's fused kernels uncompiled where there is no GPU to compile them for.

    `@torch.compile` alone imports the compiler: half of Megatron-Core's import time.
    """
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


environment.set_defaults()  # for tests and tools; the launchers do it before torch is imported

with warnings.catch_warnings(), _no_compiler():
    # Megatron-Core warns once of every optional accelerator package that is not installed
    warnings.simplefilter("ignore")
    try:
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    except Exception as error:
        if not capabilities.raised_inside("transformer_engine", error):
            raise
        # A ModuleNotFoundError in Transformer Engine leaves Megatron-Core without it; any other
        # error of it comes through.
        raise capabilities.broken_transformer_engine(capabilities.one_line(error)) from error
