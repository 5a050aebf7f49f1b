"""Environment variables that CUDA, NCCL, torch's allocator and Transformer Engine read once, when
they start.

Only the standard library is imported here, so that the launchers can set them before torch is
imported. A variable that is set already keeps its value.
"""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path

# freed memory of any size can be used again: widths differ in every batch
ALLOCATOR = "expandable_segments:True"
# torch 2.9 prefers the name PYTORCH_ALLOC_CONF, but ignores this setting there (pytorch issue
# 183387)
UNIFIED_SINCE = (2, 11)

_chosen: dict[str, str] = {}  # what was set here, since nothing was set before


def set_defaults() -> dict[str, str]:
    """Set what is not set, before torch is imported. Returns all that this process set so, name ->
    value."""
    # one queue: communication starts before the matrix product that hides it
    _default("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Transformer Engine would import JAX, too, and warn of it
    _default("NVTE_FRAMEWORK", "pytorch")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        _default(allocator_variable(metadata.version("torch")), ALLOCATOR)
    return dict(_chosen)


def set_deterministic() -> None:
    """Only algorithms that add in the same order every time, in the libraries that torch calls.
    Before CUDA starts."""
    # Transformer Engine's attention; Megatron-Core refuses another value
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    # or :16:8, slower: torch refuses matrix products with any other
    _default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # sums inside NVLink switches have no fixed order; Megatron-LM's deterministic mode refuses
    # them, too
    _default("NCCL_ALGO", "^NVLS")


def allocator_variable(torch_version: str) -> str:
    """The name by which this torch reads its allocator's settings, without a deprecation warning
    where that is possible.

    Up to 2.8 there is PYTORCH_CUDA_ALLOC_CONF alone. All later versions read it too; from 2.9 to
    2.11 they print a warning.
    """
    major, minor = torch_version.split(".")[:2]
    return (
        "PYTORCH_ALLOC_CONF"
        if (int(major), int(minor)) >= UNIFIED_SINCE
        else "PYTORCH_CUDA_ALLOC_CONF"
    )


def variables() -> dict[str, str]:
    """All variables named here that are set, name -> value."""
    names = (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NVTE_FRAMEWORK",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_ALGO",
    )
    return {name: os.environ[name] for name in names if name in os.environ}


def line() -> str:
    """`environment: NAME=value (default) NAME=value`; default: set here, not by the user."""
    words = [
        f"{name}={value}{' (default)' if _chosen.get(name) == value else ''}"
        for name, value in variables().items()
    ]
    return " ".join(["environment:", *words])


def _default(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = _chosen[name] = value


def commit() -> str:
    """Return the checkout's commit, with `+changes` when the tree differs; "unknown" outside a
    checkout."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
