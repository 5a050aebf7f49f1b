"""The figures that need a GPU, as a table for docs/results.md: python tools/benchmark.py gpu [options]

training     seconds, FLOP utilisation and peak memory of a supervised step, 7B-shaped with few layers: bf16 and each FP8 recipe
             memory against what tools/plan.py predicts for the same step, on a machine without a GPU
generation   tokens/s of this project over Hugging Face's generate: same weights, prompts and length, taking turns
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.capabilities import Capabilities, fp8_obstacle, probe
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.planning.planner import Planner
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Architecture, Optimisation, Parallel, Precision, Sampling
from gipo_megatron.telemetry.performance import PEAK_FLOPS, num_parameters
from gipo_megatron.types import Loss, Prompts, Sequences, TokenStats
from tools.benchmark_common import hugging_face, interleave, ratio, show

SEVEN_B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_positions=4096,
)
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One optimizer step of `rows` sequences of `length` tokens."""

    layers: int = 4
    rows: int = 16
    micro_batch: int = 4
    length: int = 2048
    recompute: str = "none"

    @property
    def architecture(self) -> Architecture:
        return replace(SEVEN_B, num_layers=self.layers)

    @property
    def flops(self) -> float:
        """6 per weight and token in the layers and the output layer; 6 · s · heads · head_dim per layer and token for causal attention.

        What is computed again in the backward pass does not count; an embedding is looked up, not multiplied.
        """
        a = self.architecture
        weights = num_parameters(a) - a.vocab_size * a.hidden_size
        attention = a.num_layers * self.length * a.num_heads * a.head_dim
        return 6.0 * (weights + attention) * self.rows * self.length


@dataclass(frozen=True)
class Measured:
    seconds: float  # median of the repeats
    peak_gib: float  # of what torch allocated, at its highest within a step
    mfu: float | None  # of the device's dense bf16 peak, also for FP8; None where that is not known


def supervised(output: TokenStats, rows: Sequences) -> Loss:
    return Loss({"sft": (-(output.logprobs * rows.mask).sum(), "token")})


def random_text(step: Step) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, SEVEN_B.vocab_size, (step.rows, step.length), generator=generator)
    lengths = torch.full((step.rows,), step.length)
    mask = (torch.arange(step.length) > 0).expand(step.rows, -1)
    return Sequences(tokens, mask, torch.ones(step.rows, dtype=torch.long), lengths, torch.arange(step.rows))


def new_actor(mesh: Mesh, architecture: Architecture, precision: Precision, **more: Any) -> MegatronActor:
    common = {"mesh": mesh, "architecture": architecture, "precision": precision, "seed": 0, "load": "random"}
    return MegatronActor(**{**common, "micro_batch": 1, **more}, eos_id=-1, pad_id=0, decode=str)


def measure_step(mesh: Mesh, step: Step, fp8: str = "none", repeats: int = 5) -> Measured:
    """Two unmeasured steps first: the optimizer's state and the allocator's blocks are made in them."""
    torch.cuda.empty_cache()
    optimisation = Optimisation(lr=1e-5)
    precision = Precision("bf16", fp8)
    actor = new_actor(mesh, step.architecture, precision, micro_batch=step.micro_batch, optimisation=optimisation, recompute=step.recompute)
    rows, seconds = random_text(step), []
    for repeat in range(repeats + 2):
        if repeat == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        actor.update((rows, supervised))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in torch.cuda.get_device_name()), None)
    return Measured(median, torch.cuda.max_memory_allocated() / GIB, step.flops / (median * peak) if peak is not None else None)


def predicted_gib(step: Step, fp8: str = "none") -> float:
    """The planner's peak of that step. In a process of its own that sees no GPU: a plan is made of meta tensors in a pretended world."""
    settings = {
        "recipe": "hh_sft",
        "model.architecture.num_layers": step.layers,
        "model.tokenizer": "bytes",
        "models.actor.load": "random",
        "parallel": "{tensor: 1, pipeline: 1, virtual_pipeline: 1, sequence: false}",
        "hardware": "{gpus: 1, gpu_memory_gib: 140}",
        "batch": f"{{minibatch: {step.rows}, micro_batch: {step.micro_batch}}}",
        "data.max_length": step.length,
        "data.max_response": step.length // 2,  # of no consequence here, but it must fit
        "memory.recompute": step.recompute,
        "precision.fp8": fp8,
    }
    command = [sys.executable, __file__, *(f"{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the planner failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["actor update"])


def predict(words: list[str]) -> None:
    """Prints {phase: peak in GiB} of the recipe's heaviest rank, as JSON."""
    plan = Planner().plan(compose(words, RECIPES, world=1))
    print(json.dumps({phase.name: phase.peak / GIB for phase in plan.heaviest.phases}))


def training_table(mesh: Mesh, step: Step, here: Capabilities, repeats: int) -> list[list[str]]:
    table = [["", "s / step", "tokens/s", "MFU (bf16 peak)", "peak GiB", "predicted GiB"]]
    for fp8 in ("none", "tensorwise", "blockwise", "delayed"):
        name = "bf16" if fp8 == "none" else f"FP8 {fp8}"
        if fp8 != "none" and (obstacle := fp8_obstacle(fp8, here)):
            table.append([name, obstacle, "", "", "", ""])
            continue
        found = measure_step(mesh, step, fp8, repeats)
        speed = step.rows * step.length / found.seconds
        mfu = "unknown" if found.mfu is None else f"{found.mfu:.1%}"
        table.append([name, f"{found.seconds:.3f}", f"{speed:.0f}", mfu, f"{found.peak_gib:.1f}", f"{predicted_gib(step, fp8):.1f}"])
    return table


def generation_table(mesh: Mesh, layers: int, rows: int, prompt: int, response: int, repeats: int) -> list[list[str]]:
    architecture = replace(SEVEN_B, num_layers=layers)
    actor = new_actor(mesh, architecture, Precision("bf16"))
    model = hugging_face(dict(actor.export_weights()), architecture).to(mesh.device, torch.bfloat16)
    tokens = torch.randint(1, architecture.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rows)
    prompts = Prompts(tokens, torch.full((rows,), prompt), ids, ids, ("",) * rows, ({},) * rows)
    on_device = tokens.to(mesh.device)

    def ours() -> Tensor:
        out = actor.generate(prompts, Sampling(response, temperature=0.0)).tokens
        torch.cuda.synchronize()
        return out

    def theirs() -> Tensor:
        attention = torch.ones_like(on_device)
        out = model.generate(on_device, attention_mask=attention, max_new_tokens=response, min_new_tokens=response, do_sample=False)
        torch.cuda.synchronize()
        return out

    same = float((ours() == theirs()).float().mean())
    sides: dict[str, Callable[[], object]] = {"ours": ours, "hf": theirs}
    seconds = interleave(sides, repeats)
    speeds = [f"{rows * response / statistics.median(seconds[side]):.0f}" for side in sides]
    return [
        ["", "tokens/s", "HF tokens/s", "ratio", "lowest", "highest", "same tokens"],
        ["greedy, bf16", *speeds, *(f"{x:.2f}" for x in ratio(seconds, "hf", "ours")), f"{same:.3f}"],
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    step = Step()
    for name, default in (("--layers", step.layers), ("--rows", step.rows), ("--micro-batch", step.micro_batch), ("--length", step.length)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default=step.recompute)
    for name, default in (("--prompts", 64), ("--prompt", 128), ("--response", 256), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=default)


def run_gpu(options: argparse.Namespace) -> None:
    """Raises UserError where there is no CUDA device."""
    here = probe()
    if not here.gpus:
        raise UserError("benchmark gpu: no CUDA device (tools/doctor.py says what there is)")
    gpu = here.gpus[0]
    print(
        f"{gpu.name}, {gpu.memory_gib:.0f} GiB; torch {here.torch}, CUDA {here.cuda}, NCCL {here.nccl}, megatron-core {here.megatron}, ",
        end="",
    )
    print(f"Transformer Engine {here.transformer_engine}")
    mesh = Mesh.create(Parallel(), seed=0)
    step = Step(options.layers, options.rows, options.micro_batch, options.length, options.recompute)
    print(
        f"\nsupervised step of Llama-2-7B's shape, {step.layers} layers; {step.rows} × {step.length} tokens, micro-batch {step.micro_batch}"
    )
    print(f"recompute {step.recompute}, Adam with fp32 masters, {step.flops:.3g} FLOP a step")
    show(training_table(mesh, step, here, options.repeats))
    print(f"\ngeneration, the same shape; {options.prompts} prompts, {options.prompt} + {options.response} tokens")
    show(generation_table(mesh, options.layers, options.prompts, options.prompt, options.response, options.repeats))
    mesh.close()


if __name__ == "__main__":
    predict(sys.argv[1:])
