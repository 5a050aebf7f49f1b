"""Parts `fp8` and `fp8_rest`: FP8 learns what bf16 learns, how much faster, resumes where it
stopped, and inference leaves no trace in it.

Each check takes the recipe's name; with "none" it is bf16, as the tests on a CPU run it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch

from gipo_megatron.capabilities import fp8_obstacle, probe
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine, snapshot_of
from gipo_megatron.megatron.roles import MegatronActor, MegatronReference
from gipo_megatron.specs import Precision, Sampling
from gipo_megatron.types import Prompts
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tools.gpu.bench import Bench, Figure, below, equal, figure, true
from tools.gpu.learning import SHAPE, learn, new_actor, text
from tools.gpu.models import SEVEN_B
from tools.gpu.plans import LAYERS, cases, step
from tools.gpu.te import same
from tools.gpu.training import Slope, planned, timed

RECIPES = ("tensorwise", "blockwise", "delayed")
STEPS = 20
FASTER = 1.3  # a layer's FLOP/s over bf16's
SLOPE_SECONDS = 20  # one slope takes about so long
RESUMED = 1e-3  # relative: attention's backward pass adds in any order


def fp8(bench: Bench) -> Iterator[Figure]:
    yield from curves(bench)
    plain = slope(bench, "none")
    yield figure("bf16: ms a layer", 1000 * plain.layer)
    for recipe in RECIPES:
        if fp8_obstacle(recipe, probe()):
            continue
        if bench.left < SLOPE_SECONDS:
            yield figure(f"{recipe}: speed", "not measured: no time left")
            continue
        found = slope(bench, recipe)
        yield figure(f"{recipe}: ms a layer", 1000 * found.layer)
        name, value = f"{recipe}: a layer's speed over bf16's", plain.layer / found.layer
        yield bench.fast(name, value, FASTER) if recipe == "tensorwise" else figure(name, value)


def curves(bench: Bench) -> Iterator[Figure]:
    """The loss of 20 steps. In bf16 it goes from 5.6 to 0.1 nats, on a CPU within 0.02 of fp32 at
    every step."""
    plain = learn(new_actor(bench.mesh), 0, STEPS)
    yield figure(
        "bf16: first loss, last loss",
        f"{plain[0]:.3f}, {plain[-1]:.3f}",
        "5.6, below 0.3",
        plain[0] > 5 and plain[-1] < 0.3,
    )
    for recipe in RECIPES:
        if obstacle := fp8_obstacle(recipe, probe()):
            yield figure(recipe, obstacle)
            continue
        curve = learn(new_actor(bench.mesh, recipe), 0, STEPS)
        gaps = [abs(a - b) for a, b in zip(curve, plain, strict=True)]
        yield below(f"{recipe}: first loss, gap to bf16", gaps[0], 0.05)
        yield below(f"{recipe}: mean gap", sum(gaps) / STEPS, 0.1)
        yield below(f"{recipe}: largest gap", max(gaps), 0.3)
        yield below(f"{recipe}: last loss", curve[-1], 0.4)
        yield true(f"{recipe}: it is FP8", curve != plain)


def slope(bench: Bench, recipe: str) -> Slope:
    few, many = (step(SEVEN_B, bench.tiny, layers, fp8=recipe) for layers in LAYERS)
    return Slope(few, many, (timed(bench, few, 3, 2).seconds, timed(bench, many, 3, 2).seconds))


# --------------------------------------------------------------------------------- state and memory


def fp8_rest(bench: Bench) -> Iterator[Figure]:
    able = [recipe for recipe in RECIPES if not fp8_obstacle(recipe, probe())]
    yield equal("recipes that can run", len(able), len(RECIPES))
    for recipe in able:
        yield from resumed(bench, recipe)
        yield from swapped(bench, recipe)
    yield from exchanged(bench, "tensorwise")
    if "delayed" in able:
        yield from untouched(bench)
    name = "FP8 tensorwise"
    yield planned(bench, name, timed(bench, cases(bench.tiny)[name].step, 1, 1).peak_gib)


def saved(bench: Bench, actor: MegatronActor, number: int) -> str:
    folder = bench.scratch / "fp8"
    shutil.rmtree(folder, ignore_errors=True)
    return str(checkpoint.save(folder, {"actor": actor.engine}, bench.mesh, CheckpointMeta(number)))


def resumed(bench: Bench, recipe: str) -> Iterator[Figure]:
    """From a checkpoint on, the losses of a run that did not stop; the scaling state is the same,
    and there is one only if `delayed`."""
    whole, again = new_actor(bench.mesh, recipe), new_actor(bench.mesh, recipe)
    learn(whole, 0, 5)
    checkpoint.restore(
        type(bench.scratch)(saved(bench, whole, 5)), {"actor": again.engine}, bench.mesh
    )
    states = [actor.engine.scaling.live() for actor in (whole, again)]
    yield true(
        f"{recipe}: the scaling state is restored",
        same(*states) and bool(states[0]) == (recipe == "delayed"),
    )
    mine, other = learn(again, 5, 10), learn(whole, 5, 10)
    yield below(
        f"{recipe}: losses after the resume",
        max(abs(a / b - 1) for a, b in zip(mine, other, strict=True)),
        RESUMED,
    )


def exchanged(bench: Bench, recipe: str) -> Iterator[Figure]:
    """A checkpoint of one number format in a model of another."""
    for source, target in (("none", recipe), (recipe, "none")):
        first = new_actor(bench.mesh, source)
        learn(first, 0, 2)
        second = new_actor(bench.mesh, target, load=saved(bench, first, 2), optimisation=None)
        rows = text(7)
        gap = (
            (first.logprobs(rows).logprobs - second.logprobs(rows).logprobs).abs().cpu()[rows.mask]
        )
        yield below(
            f"checkpoint of {source} in {target}: log-probs, mean gap", float(gap.mean()), 0.1
        )


def untouched(bench: Bench) -> Iterator[Figure]:
    """Log-probs and generation leave delayed scaling's history as training left it."""
    actor = new_actor(bench.mesh, "delayed")
    actor.logprobs(text(0))
    yield equal("before any training: scaling states", len(actor.engine.scaling.live()), 0)
    learn(actor, 0, 3)
    before = copied(actor.engine.scaling.live())
    yield true("training fills the histories", largest(before) > 0)
    actor.logprobs(text(4))
    ids = torch.arange(2)
    prompts = Prompts(text(5).tokens[:2, :8], torch.tensor([8, 8]), ids, ids, ("", ""), ({}, {}))
    actor.generate(prompts, Sampling(8, temperature=0.0))
    yield true("inference leaves no trace", same(before, actor.engine.scaling.live()))


def swapped(bench: Bench, recipe: str) -> Iterator[Figure]:
    """A reference that is swapped into the policy's place answers as one with a model of its own,
    and the policy stays as it was."""
    start = new_actor(bench.mesh, recipe)
    learn(start, 0, 5)
    path = saved(bench, start, 5)
    precision = Precision("bf16", recipe)
    own = build_engine("reference", bench.mesh, SHAPE, precision, micro_batch=16, load=path)
    alone, live = MegatronReference(own), new_actor(bench.mesh, recipe, load=path)
    copy = snapshot_of(live.engine, path, "reference")
    guest = MegatronReference(live.engine, state=copy)
    learn(live, 5, 8)
    rows, scaling = text(20), copied(live.engine.scaling.live())
    mine, theirs = live.logprobs(rows).logprobs, alone.logprobs(rows).logprobs
    yield true(
        f"{recipe}: the swapped reference's log-probs",
        torch.equal(guest.logprobs(rows).logprobs, theirs),
    )
    kept = torch.equal(live.logprobs(rows).logprobs, mine) and same(
        scaling, live.engine.scaling.live()
    )
    yield true(f"{recipe}: the policy after the swap", kept and not torch.equal(mine, theirs))


def copied(state: Any) -> Any:
    return (
        {key: copied(value) for key, value in state.items()}
        if isinstance(state, dict)
        else state.clone()
    )


def largest(state: Any) -> float:
    """Of all numbers in it."""
    return (
        max(map(largest, state.values()), default=0.0)
        if isinstance(state, dict)
        else float(state.float().abs().max())
    )
