"""A vLLM server beside this project: seconds and memory of a push of weights, against reading the
same weights from disk; tokens/s of a rollout, against the own decoder and Hugging Face's generate.

Needs VLLM_PYTHON, the interpreter of an environment with vLLM.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gipo_megatron.megatron.hf import export_weights, load_hf
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.serving.client import Answer, Client, Request
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.serving.transfer import TRANSFERS, Transfer
from gipo_megatron.specs import Architecture, Parallel, Precision, Serve
from gipo_megatron.weights.hf_config import architecture_from_hf
from tools.benchmark_common import interleave, ratio, show
from tools.benchmark_generate import Load, Sides

MIB = 2**20
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHARED_MEMORY = "/dev/shm"


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smollm", type=Path, required=True, help="folder of SmolLM2-135M, bf16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the server")
    parser.add_argument("--repeats", type=int, default=5)


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smollm", type=Path, required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    for name, default in (("--rows", 16), ("--prompt", 96), ("--response", 64), ("--repeats", 3)):
        parser.add_argument(name, type=int, default=default)


class Timed(Client):
    """A client that adds up the seconds of its POST requests by route."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, timeout)
        self.seconds: Counter[str] = Counter()

    def post(self, route: str, body: Any = None, **query: Any) -> Any:
        start = time.perf_counter()
        try:
            return super().post(route, body, **query)
        finally:
            self.seconds[route] += time.perf_counter() - start


@contextmanager
def served(folder: Path, dtype: str, *arguments: str) -> Iterator[Timed]:
    """A server of the folder's model, with its weights."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    with tempfile.TemporaryDirectory() as scratch:
        serve = Serve(args=["--load-format", "auto", *arguments], start_timeout=900)
        log = Path(scratch) / "server.log"
        process = ServerProcess(serve, folder.resolve(), log, DTYPES[dtype], 1024)
        start = time.perf_counter()
        client = Timed(process.start(), timeout=600)
        print(f"server in {dtype} ready after {time.perf_counter() - start:.0f} s", flush=True)
        try:
            yield client
        finally:
            client.close()
            process.stop()


@dataclass
class Trainer:
    """The model of a folder in Megatron's form, in this process."""

    folder: Path
    precision: str

    def __post_init__(self) -> None:
        self.mesh = Mesh.create(Parallel(), seed=0)
        self.architecture: Architecture = architecture_from_hf(self.folder)
        self.chunks: list[nn.Module] = list(
            build_chunks(self.architecture, self.mesh, Precision(self.precision), seed=0)
        )
        load_hf(self.folder, self.chunks, self.mesh, self.architecture)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return export_weights(self.chunks, self.mesh, self.architecture)


# --------------------------------------------------------------------------------------------- push


def run_push(options: argparse.Namespace) -> None:
    trainer = Trainer(options.smollm, "bf16")
    sizes = [tensor.nbytes for _, tensor in trainer.weights()]
    file = options.smollm / "model.safetensors"
    print(
        f"{len(sizes)} tensors in bf16, {sum(sizes) / MIB:.0f} MiB, the largest"
        f" {max(sizes) / MIB:.0f} MiB; {file.name} has {file.stat().st_size / MIB:.0f} MiB;"
        f" {torch.get_num_threads()} threads"
    )
    with served(options.smollm, options.dtype, "--enforce-eager", "--max-num-seqs", "8") as client:
        senders = {f"push by {name}": kind() for name, kind in TRANSFERS.items()}
        pushes = {name: pusher(sender, client, trainer) for name, sender in senders.items()}
        seconds, routes = measure_pushes(pushes, reads(file, client), file, client, options.repeats)
        table: list[list[object]] = [["", "s", *(f"{name} over it" for name in pushes)]]
        for name, times in seconds.items():
            over = [f"{ratio(seconds, push, name)[0]:.2f}" for push in pushes]
            table.append([name, f"{statistics.median(times):.3f}", *over])
        show(table)
        for name, spent in routes.items():
            parts = ", ".join(f"{route} {each:.3f}" for route, each in spent.items())
            print(f"{name}: s until each request's answer: {parts}")
        show(memory_table(pushes, max(sizes)))
    trainer.mesh.close()


def pusher(sender: Transfer, client: Client, trainer: Trainer) -> Callable[[], None]:
    count = itertools.count()
    return lambda: sender.push(client, trainer.weights(), f"{next(count)}")


def reads(file: Path, client: Client) -> dict[str, Callable[[], object]]:
    """Return ways to read the same weights from disk. What only maps the file is copied, so that
    every byte is read."""
    folder = str(file.parent.resolve())

    def every_byte() -> None:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensors.get_tensor(name).clone()

    def model() -> None:
        for p in LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).parameters():
            p.data.clone()

    def into_server() -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        client.post("/collective_rpc", call)

    return {
        "every byte by safetensors": every_byte,
        "transformers' from_pretrained": model,
        "vLLM's reload_weights": into_server,
    }


def measure_pushes(
    pushes: dict[str, Callable[[], None]],
    reads: dict[str, Callable[[], object]],
    file: Path,
    client: Timed,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Return seconds of each round of everything, and mean seconds of a push's requests."""
    spent: dict[str, Counter[str]] = {name: Counter() for name in pushes}
    seconds: dict[str, list[float]] = {}

    def record(name: str) -> None:
        client.seconds.clear()
        pushes[name]()
        spent[name].update(client.seconds)

    warm = {name: (lambda name=name: record(name)) for name in pushes} | {
        f"{name}, in the page cache": read for name, read in reads.items()
    }
    seconds |= interleave(warm, repeats)
    for name, read in reads.items():
        cold: list[float] = []
        for _ in range(repeats):
            forget(file)
            start = time.perf_counter()
            read()
            cold.append(time.perf_counter() - start)
        seconds[f"{name}, not in the page cache"] = cold
    rounds = repeats + 1  # interleave's first one is not measured
    means = {name: {k: v / rounds for k, v in each.items()} for name, each in spent.items()}
    return seconds, means


def forget(file: Path) -> None:
    """Take a file out of the page cache, where no process maps it."""
    gc.collect()
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_table(pushes: dict[str, Callable[[], None]], largest: int) -> list[list[object]]:
    rows: list[list[object]] = [["", "RSS + MiB", "/dev/shm + MiB", "over the largest tensor"]]
    for name, push in pushes.items():
        resident, shared = growth(push)
        rows.append(
            [
                name,
                f"{resident / MIB:.0f}",
                f"{shared / MIB:.0f}",
                f"{(resident + shared) / largest:.2f}",
            ]
        )
    return rows


def growth(action: Callable[[], None]) -> tuple[int, int]:
    """Return the peaks of this process's resident memory and of /dev/shm, above those before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # VmHWM starts at the present RSS
    before, shared = resident("VmRSS"), shutil.disk_usage(SHARED_MEMORY).used
    peak, ended = [shared], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], shutil.disk_usage(SHARED_MEMORY).used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        ended.set()
        watcher.join()
    return resident("VmHWM") - before, peak[0] - shared


def resident(field: str) -> int:
    """Return a size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(size) * 1024


# ------------------------------------------------------------------------------------------ rollout


def run_rollout(options: argparse.Namespace) -> None:
    load = Load(options.rows, options.prompt, options.response, ragged=True)
    print(
        f"{load.rows} prompts of {load.prompt // 4} to {load.prompt} tokens, at most"
        f" {load.response} more, temperature 1; {torch.get_num_threads()} threads"
    )
    table: list[list[object]] = [
        ["", "lengths", "mean", "tokens/s", "lowest", "highest", "over HF", "over the own decoder"]
    ]
    for dtype in options.dtypes:
        rows = measure_rollouts(options.smollm, dtype, load, options.repeats)
        table += [[f"{name}, {dtype}", *row] for name, *row in rows]
    show(table)


def measure_rollouts(folder: Path, dtype: str, load: Load, repeats: int) -> list[list[object]]:
    """Return the table's lines of one dtype: every side in every round, in turns."""
    trainer = Trainer(folder, dtype)
    kind = getattr(torch, DTYPES[dtype])
    model = LlamaForCausalLM.from_pretrained(folder, dtype=kind).eval()
    sides = Sides(trainer.chunks, model, trainer.architecture, trainer.mesh, load)
    counts: dict[str, list[Tensor]] = {}
    with served(folder, dtype, "--max-num-seqs", str(load.rows)) as client:
        responses = {
            "HF generate": lambda: sides.theirs(1.0)[0],
            "own decoder": lambda: sides.ours(1.0)[0],
            "vLLM over HTTP": responder(client, sides),
        }

        def side(name: str) -> Callable[[], None]:
            return lambda: counts.setdefault(name, []).append(responses[name]())

        seconds = interleave({name: side(name) for name in responses}, repeats)
    trainer.mesh.close()
    # lengths differ between sides and rounds: seconds of a token are compared
    each = {
        name: [took / int(n.sum()) for took, n in zip(times, counts[name][1:], strict=True)]
        for name, times in seconds.items()
    }
    rows: list[list[object]] = []
    for name, times in each.items():
        drawn = torch.cat(counts[name][1:]).float()
        speeds = sorted(1 / t for t in times)
        rows.append(
            [
                name,
                f"{drawn.min():.0f} to {drawn.max():.0f}",
                f"{drawn.mean():.1f}",
                *(f"{x:.0f}" for x in (statistics.median(speeds), speeds[0], speeds[-1])),
                *(f"{ratio(each, base, name)[0]:.2f}" for base in ("HF generate", "own decoder")),
            ]
        )
    return rows


def responder(client: Client, sides: Sides) -> Callable[[], Tensor]:
    """Return a side that sends one request per prompt, all at once, and returns the lengths."""
    step = itertools.count()

    def respond() -> Tensor:
        client.post("/reset_prefix_cache")  # as after an update of the weights
        first = next(step) * sides.load.rows
        requests = [
            Request(
                row[:length].tolist(),
                {
                    "temperature": 1.0,
                    "max_tokens": sides.load.response,
                    "seed": first + i,
                    "stop_token_ids": sides.ends,
                    "ignore_eos": True,
                    "logprobs": 0,
                    "detokenize": False,
                },
            )
            for i, (row, length) in enumerate(
                zip(sides.prompts.tokens, sides.prompts.lengths.tolist(), strict=True)
            )
        ]
        answers: dict[int, Answer] = {}
        client.generate(requests, answers)
        return torch.tensor([len(answers[i].token_ids) for i in range(len(requests))])

    return respond
