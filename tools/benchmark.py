"""Ratios measured in one run, the two sides taking turns: python tools/benchmark.py
generate|readout|update|padding|convert|peers|growth|push|rollout|adapters [options]

generate   tokens/s of this project over Hugging Face's generate: same model, weights, prompts and
end tokens; equal lengths, then ragged prompts and responses
readout    memory of log-probs and entropies with gradients, from hidden states, against log_softmax
of whole logits, at growing vocabularies: peak, and the largest tensor ever made
update     seconds of a GIPO iteration over those of PPO with KL: the tiny recipes, whole iterations
padding    micro-batches, padding and seconds of an SFT update, by rows and by tokens
convert    peak memory of the two converters, over the bytes of the model and of one shard
peers      samples/s and peak memory of a training step, against TRL's SFT, reward and DPO trainers
growth     seconds and peak memory of a training step against vocabulary, length, batch and layers
push       seconds and memory of a push of weights to a vLLM server, against reading them from disk
rollout    tokens/s of the own decoder, of a vLLM server over HTTP and of Hugging Face's generate
adapters   tokens/s of the own decoder with adapters beside the weights, over merged ones

On a GPU: tools/gpu_verify.py.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.cli import run
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.outputs import response_positions, token_stats
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Parallel
from gipo_megatron.training.assembly import assemble
from gipo_megatron.types import Sequences
from tools import benchmark_adapters, benchmark_growth, benchmark_peers, benchmark_vllm
from tools.benchmark_common import interleave, ratio, show
from tools.benchmark_generate import SHAPES, run_generate

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MIB = 2**20
NAIVE_BYTES = 2**30  # of whole logits, of which log_softmax and its gradient hold about five

# ------------------------------------------------------------------------------------------- update


def run_update(options: argparse.Namespace) -> None:
    """GIPO's step time over that of PPO with KL: whole iterations of the tiny recipes from random
    weights, interleaved in one process."""
    random = [
        "models.actor.load=random",
        "models.reward.load=random",
        "algorithm.critic_warmup=0",
        "run.dir=runs/benchmark",
    ]
    recipes = {
        name: compose([f"recipe=tiny/{name}", *random], RECIPES, world=1)
        for name in ("ppo_kl", "gipo")
    }
    mesh = Mesh.create(recipes["gipo"].parallel)
    steps = {
        name: stepper(assemble(recipe, mesh, lambda _: nullcontext()).algorithm.step)
        for name, recipe in recipes.items()
    }
    seconds = interleave(steps, options.repeats)
    median, lowest, highest = ratio(seconds, "gipo", "ppo_kl")
    show(
        [
            ["", "s / step"],
            *([name, f"{statistics.median(times):.3f}"] for name, times in seconds.items()),
        ]
    )
    print(f"gipo / ppo_kl: {median:.3f} ({lowest:.3f} to {highest:.3f}), {options.repeats} rounds")
    mesh.close()


def stepper(step: Callable[[int], object]) -> Callable[[], object]:
    """`step` called with 0, 1, 2, …"""
    count = itertools.count()
    return lambda: step(next(count))


# ------------------------------------------------------------------------------------------ readout


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that an operation returned in new memory."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def naive_stats(hidden: Tensor, weight: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    logp = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    picked = logp.gather(2, sequences.tokens[:, 1:, None])[..., 0]
    return picked * sequences.mask[:, 1:], -(logp.exp() * logp).sum(-1) * sequences.mask[:, 1:]


def measure_readout(side: str, rows: int, length: int, hidden_size: int, vocabulary: int) -> None:
    """Prints three numbers: extra peak MiB, largest new tensor in MiB, seconds of forward +
    backward."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, hidden_size, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=g).mul_(0.02).requires_grad_()
    tokens = torch.randint(0, vocabulary, (rows, length), generator=g)
    mask = (torch.arange(length) > 0).expand(rows, -1)
    sequences = Sequences(
        tokens,
        mask,
        torch.ones(rows, dtype=torch.long),
        torch.full((rows,), length),
        torch.arange(rows),
    )
    mesh = Mesh.create(Parallel(), seed=0)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    with LargestTensor() as watch:
        if side == "naive":
            logprobs, entropy = naive_stats(hidden, weight, sequences)
        else:
            stats = token_stats(
                hidden,
                weight,
                sequences,
                response_positions(mask),
                vocab_size=vocabulary,
                mesh=mesh,
                entropy=True,
            )
            assert stats.entropy is not None
            logprobs, entropy = stats.logprobs, stats.entropy
        (logprobs.sum() + 0.01 * entropy.sum()).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mesh.close()
    print(f"{(peak - before) / MIB:.0f} {watch.largest / MIB:.1f} {seconds:.2f}")


def run_readout(options: argparse.Namespace) -> None:
    table: list[list[object]] = [
        ["vocabulary", "", "extra peak MiB", "largest new tensor MiB", "forward + backward s"]
    ]
    for vocabulary in options.vocabulary:
        sides = ["naive", "readout"]
        if 4 * options.batch * options.length * vocabulary > NAIVE_BYTES:
            sides.remove("naive")
        for side in sides:  # a process each: a peak is never forgotten
            size = [options.batch, options.length, options.hidden, vocabulary]
            command = [sys.executable, __file__, "measure", side, *map(str, size)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            table.append([vocabulary, side, *done.stdout.split()[-3:]])
    print(
        f"fp32, {options.batch} × {options.length} tokens, hidden size {options.hidden}; the"
        " weight's gradient is one of the new tensors"
    )
    show(table)


# ------------------------------------------------------------------------------------- command line

RUNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "readout": run_readout,
    "update": run_update,
    "peers": benchmark_peers.run_peers,
    "growth": benchmark_growth.run_growth,
    "push": benchmark_vllm.run_push,
    "rollout": benchmark_vllm.run_rollout,
    "adapters": benchmark_adapters.run_adapters,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("generate")
    for name, default in (("--batch", 64), ("--prompt", 32), ("--response", 64), ("--repeats", 7)):
        one.add_argument(name, type=int, default=default)
    one.add_argument("--shape", choices=SHAPES, default="small")
    two = commands.add_parser("readout")
    for name, default in (("--batch", 4), ("--length", 1024), ("--hidden", 256)):
        two.add_argument(name, type=int, default=default)
    sizes = [4096, 32000, 151936]
    two.add_argument("--vocabulary", type=int, nargs="+", default=sizes)
    three = commands.add_parser("update")
    three.add_argument("--repeats", type=int, default=15)
    four = commands.add_parser("padding")
    for name, default in (("--rows", 32), ("--repeats", 5)):
        four.add_argument(name, type=int, default=default)
    four.add_argument(
        "--data", default="", help="folder of preference data; else lengths like HH's"
    )
    four.add_argument("--tokenizer", default="bytes")
    commands.add_parser("convert")
    benchmark_peers.add_arguments(commands.add_parser("peers"))
    benchmark_growth.add_arguments(commands.add_parser("growth"))
    benchmark_vllm.add_push_arguments(commands.add_parser("push"))
    benchmark_vllm.add_rollout_arguments(commands.add_parser("rollout"))
    benchmark_adapters.add_arguments(commands.add_parser("adapters"))
    inner = commands.add_parser("measure")
    inner.add_argument("side", choices=("naive", "readout"))
    for name in ("rows", "length", "hidden", "vocabulary"):
        inner.add_argument(name, type=int)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.command == "generate":
        run_generate(
            options.shape, options.batch, options.prompt, options.response, options.repeats
        )
    elif options.command == "padding":
        from tools.benchmark_padding import run_padding

        run_padding(options)
    elif options.command == "convert":
        from tools.benchmark_convert import run_convert

        run_convert(show)
    elif options.command in RUNS:
        RUNS[options.command](options)
    else:
        size = options.rows, options.length, options.hidden, options.vocabulary
        measure_readout(options.side, *size)


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
