"""Part `memory`: what training, offload, a checkpoint and generation allocate at most, against the
planner (golden.json)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from gipo_megatron.megatron import checkpoint
from gipo_megatron.specs import Precision, Sampling
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tools.gpu.bench import Bench, Figure
from tools.gpu.models import Step, new_actor, random_prompts, random_text, supervised, trained_actor
from tools.gpu.plans import cases
from tools.gpu.training import planned, timed


def memory(bench: Bench) -> Iterator[Figure]:
    known = cases(bench.tiny)
    for kind in ("none", "selective", "full"):
        name = f"update, recompute {kind}"
        yield planned(bench, name, timed(bench, known[name].step, repeats=1, unmeasured=1).peak_gib)
    yield from _offloaded(bench, known["update, offloaded"].step)
    yield _saved(bench, known["save"].step)
    yield _rollout(bench, known["rollout"].step)


def _offloaded(bench: Bench, one: Step) -> Iterator[Figure]:
    """Parked from the start: a forward pass brings the weights alone, an update all of it."""
    actor, rows = trained_actor(bench.mesh, one, offload="cpu"), random_text(one)
    with bench.peak() as peak:
        actor.logprobs(rows)
        yield planned(bench, "log-probs, offloaded", peak())
    actor.update((rows, supervised))
    with bench.peak() as peak:
        actor.update((rows, supervised))
        yield planned(bench, "update, offloaded", peak())


def _saved(bench: Bench, one: Step) -> Figure:
    bench.empty()
    actor = trained_actor(bench.mesh, one)
    actor.update((random_text(one), supervised))
    folder = bench.scratch / "memory"
    with bench.peak() as peak:
        checkpoint.save(folder, {"actor": actor.engine}, bench.mesh, CheckpointMeta(1))
        found = planned(bench, "save", peak())
    shutil.rmtree(folder)
    return found


def _rollout(bench: Bench, one: Step) -> Figure:
    bench.empty()
    actor = new_actor(bench.mesh, one.architecture, Precision("bf16"))
    response = one.length // 2
    prompts = random_prompts(one.architecture, one.rows, one.length - response)
    with bench.peak() as peak:
        actor.generate(prompts, Sampling(response))
        return planned(bench, "rollout", peak())
