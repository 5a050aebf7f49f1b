"""Training steps of TRL's trainers and of this project: python tools/benchmark.py peers [options]

Both sides have the same weights, rows, batches, optimizer settings and threads; each has its own
process, and they take turns, step by step. The losses of every step must agree.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gipo_megatron.errors import UserError
from tools.benchmark_common import markdown
from tools.benchmark_peers_rows import MODELS, Cell, Folders, Model, batch_of, cells
from tools.benchmark_worker import MIB, Worker, forget_peak, peak, preload, resident

AGREE = 1e-3  # of losses: absolute, above 1 relative
SIDES = {
    "ours": ("tools.benchmark_peers_ours", "Ours"),
    "trl": ("tools.benchmark_peers_trl", "Theirs"),
}
HEADER = [
    "", "samples/s", "TRL's", "ratio, median (lowest to highest)",
    "peak MiB", "TRL's", "loss, ours − TRL's",
]  # fmt: skip


class Side:
    """One side, in its own process: its steps, and how far its memory grew over the imports."""

    def __init__(self, name: str, cell: Cell, folder: str) -> None:
        self.cell, self.before = cell, resident()
        module, made = SIDES[name]
        self.side = getattr(importlib.import_module(module), made)(cell, folder)
        forget_peak()

    def step(self, number: int) -> tuple[float, float]:
        """Return (seconds, loss) of a step on batch `number`."""
        self.side.collate(batch_of(self.cell, number))
        start = time.perf_counter()
        loss = self.side.step()
        return time.perf_counter() - start, loss

    def grown(self) -> int:
        """Return the peak in bytes, beyond what the imports took."""
        return peak() - self.before


@dataclass
class Found:
    """Of each side: seconds and losses of its steps, and its peak in bytes."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.seconds["trl"], self.seconds["ours"], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    @property
    def difference(self) -> float:
        """The largest difference of two losses; of losses above 1 it is relative."""
        pairs = zip(self.losses["ours"], self.losses["trl"], strict=True)
        return max(abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs)

    def check(self, cell: Cell) -> None:
        """Raises RuntimeError where two losses differ by more than AGREE: then the sides do
        different work."""
        if not self.difference <= AGREE:
            raise RuntimeError(
                f"{cell.model.name}, {cell.title}: the losses differ by {self.difference:.1e},"
                f" which is no comparison: ours {self.losses['ours']}, TRL's {self.losses['trl']}"
            )

    def line(self, cell: Cell) -> list[object]:
        speeds = [cell.samples / statistics.median(self.seconds[side]) for side in SIDES]
        ratios = self.ratios
        return [
            cell.title,
            *(f"{speed:.3g}" for speed in speeds),
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
            *(f"{self.peaks[side] / MIB:.0f}" for side in SIDES),
            f"{self.difference:.0e}",
        ]


def compare(cell: Cell, folder: str, rounds: int) -> Found:
    """Measure `rounds` steps of both sides in turns, after one step each for warming up. Raises
    RuntimeError as `Found.check`."""
    workers = {name: Worker(Side, name, cell, folder) for name in SIDES}
    found = Found({name: [] for name in SIDES}, {name: [] for name in SIDES})
    for worker in workers.values():
        worker.ready()
    for number in range(rounds + 1):
        for name, worker in workers.items():
            seconds, loss = worker("step", number)
            found.losses[name].append(loss)
            if number:
                found.seconds[name].append(seconds)
    found.peaks = {name: worker("grown") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    found.check(cell)
    return found


@contextmanager
def weights_of(model: Model, policy: str | None) -> Iterator[str]:
    """Yield a temporary folder with policy/ and reward/; `policy` is a Hugging Face folder, or None
    for random weights."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Worker(Folders, model, folder, policy)
        maker.ready()
        maker.close()
        yield folder


def smollm(options: Namespace) -> str | None:
    """Return the folder with SmolLM2's weights, None without the option. Raises UserError where it
    has none."""
    if options.smollm and not (Path(options.smollm) / "model.safetensors").is_file():
        raise UserError(
            f"{options.smollm} has no model.safetensors",
            where="--smollm",
            fix="python tools/fetch_smollm.py makes it; without --smollm weights are random",
        )
    return options.smollm


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["8M", "smollm2"])
    parser.add_argument("--smollm", help="folder of tools/fetch_smollm.py; else random weights")
    parser.add_argument("--rounds", type=int, help="measured steps; the default is the model's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def run_peers(options: Namespace) -> None:
    if importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed", fix="pip install -e '.[dev]'")
    prepare(options.threads)
    for name in options.models:
        model = MODELS[name]
        rounds = options.rounds or model.rounds
        policy = smollm(options) if name == "smollm2" else None
        origin = "its own weights" if policy else "random weights"
        table: list[list[object]] = [HEADER]
        start = time.perf_counter()
        with weights_of(model, policy) as folder:
            for cell in cells(model):
                table.append(compare(cell, folder, rounds).line(cell))
        spent = time.perf_counter() - start
        a = model.architecture
        print(
            f"\n{model.name} ({a.num_layers} layers, hidden {a.hidden_size}, vocabulary"
            f" {a.vocab_size}), {origin}, fp32; {model.rows} sequences of at most {model.longest}"
            f" tokens a batch; {options.threads} threads; {rounds} rounds; {spent:.0f} s\n"
        )
        markdown(table)


def prepare(threads: int) -> None:
    """Set what the processes of both sides inherit. Call it before the first of them starts."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", **quiet)
    preload([module for module, _ in SIDES.values()])
