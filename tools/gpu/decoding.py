"""Parts `decode` and `hf`: milliseconds a token against what the memory's bandwidth allows, and
against Hugging Face's generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gipo_megatron.megatron import decode_loop
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.kv_budget import Need, Room, find_room
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Architecture, Precision, Sampling
from gipo_megatron.telemetry.performance import num_parameters
from gipo_megatron.types import Prompts
from tools.benchmark_common import hf_config
from tools.benchmark_generate import SHAPES
from tools.gpu.bench import GIB, Bench, Figure, equal, figure
from tools.gpu.machine import bandwidth, cudnn_attention
from tools.gpu.models import SEVEN_B, new_actor, random_prompts, shape

ITEM = 2  # bytes of a bf16 number
OLD_CACHE = 4 << 30  # the former fixed limit of the cache
SHARE = 0.85  # of the limit that memory sets
GRAPHS = 3.0  # times the tokens/s of a small model's eager steps
TIMES = 1.5  # Hugging Face's tokens/s


@dataclass(frozen=True)
class Load:
    """Prompts of `prompt` tokens, responses of `response`, of which the first `short` are timed
    apart: prefill."""

    rows: int
    prompt: int
    response: int
    short: int


def loads(tiny: bool) -> list[Load]:
    return (
        [Load(rows, 4, 6, 2) for rows in (1, 4)]
        if tiny
        else [Load(rows, 128, 128, 8) for rows in (1, 64, 256)]
    )


def decode(bench: Bench) -> Iterator[Figure]:
    """7B, random weights, greedy; no response ends early."""
    architecture = shape(SEVEN_B, bench.tiny)
    actor = new_actor(bench.mesh, architecture, Precision("bf16"))
    rate = bandwidth(bench)
    for load in loads(bench.tiny):
        seconds = step_seconds(bench, load, actor.generate, architecture)
        limit = read_bytes(architecture, load) / rate
        yield figure(f"batch {load.rows}: ms a step", 1000 * seconds)
        yield figure(f"batch {load.rows}: tokens/s", load.rows / seconds)
        share = limit / seconds
        label = f"batch {load.rows}: share of the memory's limit, {1000 * limit:.3g} ms"
        yield bench.fast(label, share, SHARE) if load.rows == 64 else figure(label, share)
    middle = loads(bench.tiny)[1]
    yield from _graphs(bench, actor, architecture, middle, "7B", 1.0)
    yield from _room(bench, architecture, loads(bench.tiny)[-1])
    yield from _caches(bench, actor, architecture)
    del actor
    bench.empty()
    small = shape(SHAPES["smollm2_135m"], bench.tiny)
    actor = new_actor(bench.mesh, small, Precision("bf16"))
    yield from _graphs(bench, actor, small, middle, "135M", GRAPHS)


def _graphs(
    bench: Bench,
    actor: MegatronActor,
    architecture: Architecture,
    load: Load,
    name: str,
    at_least: float,
) -> Iterator[Figure]:
    """CUDA graphs against the same steps run eagerly: milliseconds, tokens, and what recording
    costs. A CPU has no graphs: both are eager."""
    took: dict[bool, float] = {}
    tokens: dict[bool, Tensor] = {}
    prompts = random_prompts(architecture, load.rows, load.prompt)
    for on in (True, False):
        with graphs(on) as recorded:
            took[on] = step_seconds(bench, load, actor.generate, architecture)
            recorded.clear()
            tokens[on] = actor.generate(prompts, Sampling(load.response, temperature=0.0)).tokens
        if on:
            yield figure(f"{name}: graphs of a call", len(recorded))
            yield figure(f"{name}: seconds to record them", sum(recorded))
    yield figure(f"{name}, batch {load.rows}: ms an eager step", 1000 * took[False])
    label = f"{name}, batch {load.rows}: graphs over eager steps"
    yield bench.fast(label, took[False] / took[True], at_least)
    same = float((tokens[True] == tokens[False]).float().mean())
    yield equal(f"{name}: same tokens with graphs", same, 1.0)


@contextmanager
def graphs(on: bool) -> Iterator[list[float]]:
    """Generation with or without CUDA graphs. Yields the seconds that each was recorded in."""
    recorded: list[float] = []
    capture = decode_loop.capture

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        graph = capture(*arguments)
        recorded.append(time.perf_counter() - start)
        return graph

    def eager(self: decode_loop.Graphs, step: Callable[..., None], rows: int, slots: int) -> None:
        step(rows, slots)

    with ExitStack() as stack:
        stack.enter_context(patch.object(decode_loop, "capture", timed))
        if not on:
            stack.enter_context(patch.object(decode_loop.Graphs, "__call__", eager))
        yield recorded


def _room(bench: Bench, architecture: Architecture, load: Load) -> Iterator[Figure]:
    """Yield the share of the free memory that generation takes, and its rows."""
    need = Need(architecture, bench.mesh.parallel, ITEM)
    room = find_room(bench.mesh, need, load.prompt, Sampling(load.response, temperature=0.0))
    yield figure("room for caches and logits, GiB", room.size / GIB)
    yield figure(
        f"rows of {load.prompt} + {load.response} tokens at once",
        room.rows(load.prompt + load.response, need.token),
    )


def read_bytes(a: Architecture, load: Load) -> float:
    """Of one step: all weights but the embedding (a look-up), and the keys and values of prompts
    and half the responses."""
    weights = num_parameters(a) - (0 if a.tied_embeddings else a.vocab_size * a.hidden_size)
    token = 2 * a.num_layers * a.num_kv_heads * a.head_dim
    return ITEM * (weights + load.rows * (load.prompt + load.response / 2) * token)


def step_seconds(
    bench: Bench,
    load: Load,
    respond: Callable[[Prompts, Sampling], object],
    architecture: Architecture,
) -> float:
    """(long response - short response) / their difference, so that prefill and set-up drop out."""
    prompts = random_prompts(architecture, load.rows, load.prompt)
    took = [
        bench.seconds(
            lambda n=n: respond(prompts, Sampling(n, temperature=0.0)), repeats=2, unmeasured=1
        )
        for n in (load.short, load.response)
    ]
    return (took[1] - took[0]) / (load.response - load.short)


def _caches(bench: Bench, actor: MegatronActor, architecture: Architecture) -> Iterator[Figure]:
    """The whole batch at once, where the card has room for it, against slices of 4 GiB."""
    load = loads(bench.tiny)[1]
    prompts, sampling = (
        random_prompts(architecture, load.rows, load.prompt),
        Sampling(load.response, temperature=0.0),
    )
    small = Room(OLD_CACHE if not bench.tiny else 1)

    def sliced() -> Any:
        engine = actor.engine
        with engine.ready():
            arguments = (
                engine.chunks,
                architecture,
                bench.mesh,
                prompts,
                sampling,
                actor.eos_id,
                actor.pad_id,
                actor.decode,
            )
            return generate(*arguments, room=small)

    found: dict[str, Any] = {}
    (whole,) = bench.each(lambda: found.update(whole=actor.generate(prompts, sampling)), 1)
    (slices,) = bench.each(lambda: found.update(slices=sliced()), 1)
    yield figure(
        f"batch {load.rows}: seconds in slices of {small.size / GIB:.3g} GiB, over those at once",
        slices / whole,
    )
    same = (found["whole"].tokens == found["slices"].tokens).float().mean()
    yield figure(f"batch {load.rows}: same tokens in slices", float(same))


# ------------------------------------------------------------------------------------- Hugging Face


def hf(bench: Bench) -> Iterator[Figure]:
    """The same weights, prompts and lengths, greedy: tokens/s of both, without cuDNN's attention
    for either; then its as torch comes."""
    architecture = shape(SEVEN_B, bench.tiny)
    theirs = hugging_face(bench, architecture)
    actor = new_actor(bench.mesh, architecture, Precision("bf16"))
    load_hf(
        {name: p.detach() for name, p in theirs.named_parameters()},
        actor.engine.chunks,
        bench.mesh,
        architecture,
    )
    load = Load(4, 4, 6, 2) if bench.tiny else Load(64, 128, 64, 8)
    prompts, sampling = (
        random_prompts(architecture, load.rows, load.prompt),
        Sampling(load.response, temperature=0.0),
    )
    ours = bench.seconds(lambda: actor.generate(prompts, sampling), repeats=2)
    with cudnn_attention(False):
        pinned = bench.seconds(lambda: respond(theirs, prompts, load.response), repeats=2)
    count = load.rows * load.response
    yield figure("tokens/s, ours", count / ours)
    yield figure("tokens/s, Hugging Face, cuDNN's attention off", count / pinned)
    yield bench.fast("ours over Hugging Face's", pinned / ours, TIMES)
    with cudnn_attention(True):
        (slow,) = bench.each(lambda: respond(theirs, prompts, load.short), 1)
    yield figure("ms a token, Hugging Face as torch comes, new lengths", 1000 * slow / load.short)
    mine = actor.generate(prompts, sampling).tokens.cpu()
    same = (mine == respond(theirs, prompts, load.response).cpu()).float().mean()
    yield figure("same tokens", float(same))


def hugging_face(bench: Bench, architecture: Architecture) -> LlamaForCausalLM:
    """Random weights, made on the device in bf16."""
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=[bench.mesh.device] if bench.cuda else [])
        )
        torch.manual_seed(0)
        stack.enter_context(torch.device(bench.device))
        before = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.bfloat16)
        return LlamaForCausalLM(hf_config(architecture)).eval()


def respond(model: LlamaForCausalLM, prompts: Prompts, response: int) -> Tensor:
    tokens = prompts.tokens.to(model.device)
    lengths: dict[str, Any] = {
        "max_new_tokens": response,
        "min_new_tokens": response,
        "do_sample": False,
    }
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **lengths)
