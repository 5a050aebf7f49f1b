"""Parts `machine` and `sdpa`: what this machine is, how fast its memory and matrix units are, and
what attention costs in a new shape."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gipo_megatron import capabilities, environment
from tools.gpu.bench import GIB, Bench, Figure, below, figure, true

QUERIES = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.total,memory.used"


def machine(bench: Bench) -> Iterator[Figure]:
    """Versions; copy TB/s and bf16 TFLOP/s; which attention backend torch takes."""
    here = capabilities.probe()
    for name in ("python", "torch", "cuda", "nccl", "megatron", "transformer_engine"):
        yield figure(name, getattr(here, name) or "none")
    yield figure("cudnn", str(torch.backends.cudnn.version() or "none"))
    yield figure("environment", environment.line().removeprefix("environment: "))
    mesh = bench.mesh
    if not bench.cuda:
        return
    yield figure("gpu", f"{here.gpus[0].name}, {here.gpus[0].memory_gib:.1f} GiB")
    yield figure("nvidia-smi", nvidia_smi())
    yield figure("free memory, GiB", torch.cuda.mem_get_info()[0] / GIB)
    yield true("cuDNN's attention is off (F1)", not torch.backends.cuda.cudnn_sdp_enabled())
    backend = torch.distributed.group.WORLD._get_backend(mesh.device)
    yield true("collectives are NCCL's", "nccl" in type(backend).__name__.lower())
    yield from _choices(bench)
    yield figure("copy, TB/s", bandwidth(bench) / 1e12)
    size = 512 if bench.tiny else 8192
    yield figure(f"matrix product bf16 {size}³, TFLOP/s", matrix_rate(bench, size) / 1e12)
    yield figure("nvidia-smi after it", nvidia_smi())


def nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not there"
    command = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=False)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def bandwidth(bench: Bench) -> float:
    """Bytes/s of a copy within the device, read and written."""
    size = (1 << 20) if bench.tiny else GIB
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / bench.seconds(lambda: target.copy_(source), repeats=10, unmeasured=3)


def matrix_rate(bench: Bench, size: int) -> float:
    """FLOP/s of a bf16 matrix product of random numbers."""
    g = torch.Generator(bench.device).manual_seed(0)
    a, b = (torch.randn(size, size, device=bench.device, generator=g).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / bench.seconds(lambda: torch.mm(a, b, out=out), repeats=10, unmeasured=3)


def _choices(bench: Bench) -> Iterator[Figure]:
    """The backend that torch takes for a training shape and for a decoding one: as torch comes, and
    as this project sets it."""
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    for setting, on in (("as torch comes", True), ("cuDNN off", False)):
        with cudnn_attention(on):
            for name, (q, k, causal) in {
                "training": (_new(bench, 4, 32, 2048), None, True),
                "decoding": _decoding(bench),
            }.items():
                k = q if k is None else k
                choice = torch._fused_sdp_choice(q, k, k, is_causal=causal)
                yield figure(f"attention, {name}, {setting}", names.get(int(choice), str(choice)))


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _new(bench: Bench, rows: int, heads: int, length: int, width: int = 128) -> Tensor:
    g = torch.Generator(bench.device).manual_seed(0)
    return torch.randn(
        rows,
        heads,
        length,
        width,
        device=bench.device,
        dtype=torch.bfloat16,
        requires_grad=True,
        generator=g,
    )


def _decoding(bench: Bench) -> tuple[Tensor, Tensor, bool]:
    """One new token of 64 rows over 256 that are there: decode.py's shapes."""
    return _new(bench, 64, 32, 1).detach(), _new(bench, 64, 32, 256).detach(), False


# --------------------------------------------------------------------------------------- new shapes


def sdpa(bench: Bench) -> Iterator[Figure]:
    """F1: cuDNN builds a plan for every new shape. Milliseconds of six new training shapes and 32
    growing caches, with and without it."""
    rows, lengths = (2, range(65, 71)) if bench.tiny else (4, range(1025, 1031))
    steps = range(9, 41) if bench.tiny else range(257, 289)
    backward(_new(bench, 1, 4, 64))  # what is made once, is made here
    found: dict[str, list[float]] = {}
    for name, on in (("default", True), ("pinned", False)):
        with cudnn_attention(on):
            found[f"{name}, new shape"] = [
                _ms(bench, lambda s=s: backward(_new(bench, rows, 8, s))) for s in lengths
            ]
            found[f"{name}, longer cache"] = [
                _ms(bench, lambda s=s: decode_one(bench, s)) for s in steps
            ]
    for name, times in found.items():
        yield figure(
            f"{name}: ms, median and longest", f"{statistics.median(times):.3f}, {max(times):.3f}"
        )
    step = statistics.median(found["pinned, longer cache"])
    yield (
        below("a decoding step's attention with a new length, pinned, ms", step, 2.0)
        if bench.cuda
        else figure("pinned, ms", step)
    )
    yield from _fixed(bench)


def _ms(bench: Bench, call: object) -> float:
    return 1000 * bench.each(call, repeats=1)[0]  # type: ignore[arg-type]


def backward(q: Tensor) -> None:
    F.scaled_dot_product_attention(q, q, q, is_causal=True).float().sum().backward()


def decode_one(bench: Bench, slots: int) -> Tensor:
    q = torch.ones(16, 8, 1, 128, device=bench.device, dtype=torch.bfloat16)
    k = torch.ones(16, 8, slots, 128, device=bench.device, dtype=torch.bfloat16)
    return F.scaled_dot_product_attention(q, k, k)


def _fixed(bench: Bench) -> Iterator[Figure]:
    """cuDNN against flash at one shape, forward and backward: what giving it up costs training."""
    q = _new(bench, 1, 2, 64) if bench.tiny else _new(bench, 4, 32, 2048)
    backends = [SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if bench.cuda else [])]
    for backend in backends:

        def call(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend), cudnn_attention(True):
                backward(q)

        yield figure(
            f"{backend.name}, 4 × 2048, 32 heads, forward and backward, ms",
            1000 * bench.seconds(call, unmeasured=2),
        )
