"""An SFT update with `micro_batch: 4` and with `micro_tokens` of the same largest micro-batch, on
lengths like HH's or on data of your own: python tools/benchmark.py padding [--data FOLDER]"""

from __future__ import annotations

import argparse
import statistics

import torch

from gipo_megatron.algorithms.sft import negative_log_likelihood
from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import load_tokenizer
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Architecture, Optimisation, Parallel, Precision
from gipo_megatron.types import Loss, Sequences, TokenStats
from tools.benchmark_common import interleave, ratio, show

MODEL = Architecture(8, 256, 688, 8, 4, 32, 32000, 2048)
LIMITS: dict[str, tuple[int | None, int | None]] = {
    "micro_batch 4": (4, None),
    "micro_tokens 8192": (None, 8192),
}


def like_hh(count: int, vocab_size: int = MODEL.vocab_size) -> Sequences:
    """Log-normal lengths (median 155, mean 190, at most 1036); the last third is the response."""
    generator = torch.Generator().manual_seed(0)
    drawn = 155 * (0.64 * torch.randn(count, generator=generator)).exp()
    lengths = drawn.long().clamp(16, 1036)
    place = torch.arange(int(lengths.max()))
    tokens = torch.randint(1, vocab_size, (count, len(place)), generator=generator)
    mask = (place >= lengths[:, None] * 2 // 3) & (place < lengths[:, None])
    return Sequences(tokens, mask, lengths * 2 // 3, lengths, torch.arange(count))


def padding(engine: Engine, rows: Sequences) -> tuple[int, float]:
    """(micro-batches, share of padding)"""
    slots = engine._plan(rows)
    whole = sum(slot.sequences.tokens.numel() for slot in slots)
    return len(slots), 1 - int(rows.lengths.sum()) / whole


def loss(output: TokenStats, rows: Sequences) -> Loss:
    return Loss({"nll": (negative_log_likelihood(output, rows), "token")})


def run_padding(options: argparse.Namespace) -> None:
    rows = like_hh(options.rows)
    if options.data:
        config = DataConfig(path=options.data, template="hh")
        data = load_data(config, load_tokenizer(options.tokenizer), "train", 0, "sft")
        rows = data.examples(0, options.rows)
    mesh = Mesh.create(Parallel(), seed=0)
    precision = Precision("fp32" if mesh.device.type == "cpu" else "bf16")
    engine = build_engine("actor", mesh, MODEL, precision, optimisation=Optimisation(lr=1e-4))
    actor = MegatronActor(engine, eos_id=1, pad_id=0, decode=str)

    def update(limit: tuple[int | None, int | None]) -> None:
        engine.micro_batch, engine.micro_tokens = limit
        actor.update((rows, loss))

    seconds = interleave({n: lambda x=x: update(x) for n, x in LIMITS.items()}, options.repeats)
    table: list[list[object]] = [["", "micro-batches", "padding", "s / update"]]
    for name, (engine.micro_batch, engine.micro_tokens) in LIMITS.items():
        count, share = padding(engine, rows)
        table.append([name, count, f"{share:.1%}", f"{statistics.median(seconds[name]):.3f}"])
    show(table)
    median, lowest, highest = ratio(seconds, *LIMITS)
    print(f"micro_batch / micro_tokens: {median:.2f} ({lowest:.2f} to {highest:.2f})")
    mesh.close()
