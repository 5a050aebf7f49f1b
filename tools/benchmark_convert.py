"""Peak memory of the converters, each in a process of its own (a peak is never forgotten): python
tools/benchmark.py convert"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from gipo_megatron.telemetry.console import Display

MIB = 2**20
SHARD = 256 * MIB


def make_model(folder: Path) -> int:
    """A Llama of 0.37 billion parameters in bf16, in shards; returns its bytes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size=SHARD)
    byte_tokenizer().save(folder)
    return sum(p.nbytes for p in model.parameters())


def measure(direction: str, source: str, out: str, verify: bool) -> None:
    """Prints the MiB that were resident beforehand (libraries, process groups), at the peak, and
    the seconds."""
    mesh = Mesh.create(Parallel())
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    if direction == "to Megatron":
        to_megatron(source, Path(out), mesh, verify=verify, progress=Display(shown=False))
    else:
        to_hf(
            Path(source),
            Path(out),
            mesh,
            verify=verify,
            progress=Display(shown=False),
            shard_bytes=SHARD,
        )
    seconds = time.perf_counter() - start
    mesh.close()
    print(
        f"{before / MIB:.0f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB:.0f}"
        f" {seconds:.1f}"
    )


def run_convert(show: Callable[[list[list[object]]], None]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "make", str(folder / "hf")]
        size = int(
            subprocess.run(
                command, capture_output=True, encoding="utf-8", check=True
            ).stdout.split()[-1]
        )
        bound = size + SHARD
        print(
            f"bf16 model of {size / MIB:.0f} MiB, shards of {SHARD / MIB:.0f} MiB:"
            f" {bound / MIB:.0f} MiB together"
        )
        table: list[list[object]] = [
            ["", "before MiB", "peak MiB", "peak - before", "/ (model + shard)", "s"]
        ]
        sides = (
            ("to Megatron", "hf", "checkpoint", "false"),
            ("to Hugging Face", "checkpoint", "again", "false"),
            ("to Hugging Face, verified in fp32", "checkpoint", "verified", "true"),
        )
        for title, source, out, verify in sides:
            command = [
                sys.executable,
                __file__,
                title.split(",")[0],
                str(folder / source),
                str(folder / out),
                verify,
            ]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            before, peak, seconds = done.stdout.split()[-3:]
            grown = (float(peak) - float(before)) * MIB
            table.append(
                [title, before, peak, f"{grown / MIB:.0f}", f"{grown / bound:.2f}", seconds]
            )
        show(table)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        print(make_model(Path(sys.argv[2])))
    else:
        measure(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "true")
