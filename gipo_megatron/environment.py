"""Environment variables that CUDA, NCCL, torch's allocator and Transformer Engine read once, when
they start.

Imports only the standard library, so that launchers can set the variables before they import torch.
A variable that is set already keeps its value.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TextIO

# freed memory of any size can be used again, because widths differ in every batch
ALLOCATOR = "expandable_segments:True"
# torch 2.9 prefers the name PYTORCH_ALLOC_CONF, but ignores this setting there (pytorch issue
# 183387)
UNIFIED_SINCE = (2, 11)

_chosen: dict[str, str] = {}  # variables that were not set before, and the value set here


def set_defaults() -> dict[str, str]:
    """Set variables that are not set; call before torch is imported. Return those set by this
    process, name -> value."""
    # one queue, so that communication starts before the matrix product that hides it
    _default("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # otherwise Transformer Engine also imports JAX, with a warning
    _default("NVTE_FRAMEWORK", "pytorch")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        _default(allocator_variable(metadata.version("torch")), ALLOCATOR)
    return dict(_chosen)


def set_deterministic() -> None:
    """Restrict the libraries that torch calls to algorithms with a fixed order of addition. Call
    before CUDA starts."""
    # for Transformer Engine's attention; Megatron-Core requires this value
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    # torch requires this value or :16:8, which is slower
    _default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # no sums inside NVLink switches: their order is not fixed (as Megatron-LM's deterministic mode)
    _default("NCCL_ALGO", "^NVLS")


def allocator_variable(torch_version: str) -> str:
    """Return the name of the variable with the allocator's settings for this torch, without a
    deprecation warning where possible.

    Up to 2.8 only PYTORCH_CUDA_ALLOC_CONF exists. All later versions read it too; from 2.9 to 2.11
    they print a warning.
    """
    major, minor = torch_version.split(".")[:2]
    return (
        "PYTORCH_ALLOC_CONF"
        if (int(major), int(minor)) >= UNIFIED_SINCE
        else "PYTORCH_CUDA_ALLOC_CONF"
    )


def variables() -> dict[str, str]:
    """Return the variables of this module that are set, name -> value."""
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
    """Return `environment: NAME=value (default) NAME=value`; default: set here, not by the user."""
    words = [
        f"{name}={value}{' (default)' if _chosen.get(name) == value else ''}"
        for name, value in variables().items()
    ]
    return " ".join(["environment:", *words])


def _default(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = _chosen[name] = value


def set_output() -> None:
    """Make stdout and stderr print on any terminal: `?` stands for what its encoding lacks. A
    closed one becomes /dev/null, so that no other file gets its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output(stream: TextIO | None = None) -> None:
    """Drop what is printed to `stream`, or stdout, from now on: nothing takes it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, (stream or sys.stdout).fileno())
    os.close(nowhere)


def emit(message: object, *, error: bool = True) -> None:
    """Print to stderr, or stdout, and do not fail where that is a file on a full disk, or has no
    reader: it is dropped then, and so is all that comes later."""
    texts = ("", f"{message}\n") if error else (f"{message}\n", "")
    for stream, text in zip((sys.stdout, sys.stderr), texts, strict=True):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            drop_output(stream)


def commit() -> str:
    """Return the checkout's commit, with `+changes` when the tree differs; "unknown" outside a
    checkout."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
