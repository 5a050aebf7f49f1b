"""The verdict on a plan, and the cheapest change with which it fits. Each change is planned
itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gipo_megatron.errors import UserError
from gipo_megatron.planning.compute import bubble
from gipo_megatron.planning.planner import Plan, Planner
from gipo_megatron.planning.server import GIB, Server
from gipo_megatron.recipe.length import kind_of
from gipo_megatron.recipe.schema import NODE, Recipe

# more key=value words -> the recipe with them; UserError when that is no recipe
Vary = Callable[[Sequence[str]], Recipe]
Words = tuple[str, ...]
RECOMPUTE = ("none", "selective", "full")  # from least to most that is computed again


@dataclass(frozen=True)
class Part:
    """One change: words for the command line, and what they cost."""

    words: Words
    cost: str


@dataclass(frozen=True)
class Change:
    """Parts, the cheapest first, and the plan that they give together."""

    parts: tuple[Part, ...]
    plan: Plan

    @property
    def words(self) -> Words:
        return tuple(word for part in self.parts for word in part.words)

    @property
    def peak(self) -> int:
        return self.plan.heaviest.worst.peak


@dataclass(frozen=True)
class Verdict:
    fits: bool | None  # None: on a CPU, no limit is known
    warnings: tuple[str, ...] = ()
    change: Change | None = None  # the cheapest that fits
    closest: Change | None = None  # when none does: the one that needs least memory


def judge(plan: Plan, planner: Planner, vary: Vary) -> Verdict:
    """Compare the plan with its GPU.

    Changes are tried alone, from the cheapest to the dearest, then added up; of the first that
    fits, the parts that are not needed are dropped. A plan that fits is tried with less
    recomputation.
    """
    warnings = tuple(_warnings(plan))
    if not plan.limit:
        return Verdict(None, warnings)
    tried = partial(_tried, planner, vary)
    if plan.fits:
        return Verdict(True, (*warnings, *_needless(plan, tried), *_waiting(plan, tried)))
    found = []
    for parts in changes(plan):
        change = tried(parts)
        if change is not None and change.plan.fits:
            return Verdict(False, warnings, change=_needed(change, tried))
        found += [change] if change is not None else []
    closest = min(found, key=lambda change: change.peak, default=None)
    return Verdict(False, warnings, closest=closest)


def _tried(planner: Planner, vary: Vary, parts: tuple[Part, ...]) -> Change | None:
    """Plan these changes; None where the recipe does not divide like that."""
    try:
        recipe = vary([word for part in parts for word in part.words])
        return Change(parts, planner.plan(recipe))
    except UserError:
        return None


Tried = Callable[[tuple[Part, ...]], Change | None]


def _needed(change: Change, tried: Tried) -> Change:
    """Return the change without the parts that are not needed; the dearest is left out first."""
    for part in reversed(change.parts):
        if len(change.parts) == 1:
            break
        less = tried(tuple(kept for kept in change.parts if kept is not part))
        if less is not None and less.plan.fits:
            change = less
    return change


def _needless(plan: Plan, tried: Tried) -> Iterator[str]:
    """Warn of recomputation that the memory does not need, and name the cheapest setting that
    fits."""
    current = plan.recipe.memory.recompute
    for name in RECOMPUTE[: RECOMPUTE.index(current)]:
        change = tried((Part((f"memory.recompute={name}",), ""),))
        if change is not None and change.plan.fits:
            worst = change.plan.heaviest.worst
            yield (
                f"memory.recompute={current} computes activations twice without need:"
                f" memory.recompute={name} fits, too ({worst.peak / GIB:.1f} GiB in {worst.name!r})"
            )
            return


def _waiting(plan: Plan, tried: Tried) -> Iterator[str]:
    """Warn of GPUs that wait while the server works on a part of them, where it is worth a tenth of
    an iteration."""
    server, best = plan.server, plan
    if server is None or not server.shared:
        return
    for tensor in _doubled(server.tensor, min(plan.gpus_per_node, plan.recipe.world)):
        change = tried((Part((f"algorithm.rollout.serve.tensor_parallel={tensor}",), ""),))
        if change is not None and change.plan.fits and _seconds(change.plan) < 0.9 * _seconds(best):
            best = change.plan
    if best.server is not None and best is not plan:
        yield (
            f"the server works on {server.tensor} of {plan.gpus_per_node} GPUs, and training waits:"
            f" algorithm.rollout.serve.tensor_parallel={best.server.tensor} makes an iteration of"
            f" {_seconds(best):.0f} s out of {_seconds(plan):.0f} (estimated)"
        )


def _seconds(plan: Plan) -> float:
    assert plan.time is not None, "a plan for GPUs has times"
    return plan.time.seconds


def changes(plan: Plan) -> Iterator[tuple[Part, ...]]:
    """Yield changes, cheapest first: alone, then each on top of the strongest of all kinds before
    it."""
    kinds = [[Part(words, cost) for words in found] for cost, found in _kinds(plan)]
    for kind in kinds:
        yield from ((part,) for part in kind)
    so_far: tuple[Part, ...] = ()
    for kind in kinds:
        if so_far:
            yield from ((*so_far, part) for part in kind)
        so_far += tuple(kind[-1:])


def _kinds(plan: Plan) -> Iterator[tuple[str, list[Words]]]:
    """Yield (cost, changes at that cost, the weakest first), from the lowest cost to the
    highest."""
    recipe, parallel = plan.recipe, plan.recipe.parallel
    if plan.server is not None:
        yield _share(plan.server)
    yield "smaller matrix products", _smaller(recipe)
    more = RECOMPUTE[RECOMPUTE.index(recipe.memory.recompute) + 1 :]
    yield "activations computed twice", [(f"memory.recompute={name}",) for name in more]
    yield "models travel between host and GPU in every iteration", _offload(recipe)
    tensor = _doubled(parallel.tensor, min(plan.gpus_per_node, recipe.world))
    yield (
        "traffic inside each layer, fewer replicas",
        [(f"parallel.tensor={n}", "parallel.sequence=true") for n in tensor],
    )
    stages = min(recipe.world // parallel.tensor, recipe.model.architecture.num_layers)
    pipeline = _doubled(parallel.pipeline, stages)
    yield "pipeline bubbles, fewer replicas", [(f"parallel.pipeline={n}",) for n in pipeline]
    yield "more GPUs", _more(recipe)


def _smaller(recipe: Recipe) -> list[Words]:
    """Return smaller micro-batches: divisors of the rows, or halves of the token budget, down to
    the longest row."""
    rows, tokens = recipe.batch.micro_batch, recipe.batch.micro_tokens
    if rows is not None:
        divisors = [n for n in range(rows - 1, 0, -1) if rows % n == 0]
        return [(f"batch.micro_batch={n}",) for n in divisors]
    assert tokens is not None, "the recipe check requires one of the two"
    longest = recipe.data.longest_row(kind_of(recipe) == "preference")
    halves = [tokens // 2**n for n in range(1, 32)]
    return [(f"batch.micro_tokens={n}",) for n in halves if n >= longest]


def _share(server: Server) -> tuple[str, list[Words]]:
    """Return other shares of its GPUs with which the server starts, in steps of 0.05: larger ones
    where its own is too small, else smaller ones."""
    key, now = "algorithm.rollout.serve.gpu_memory", server.serve.gpu_memory
    shares = [n / 20 for n in range(1, 19) if n / 20 * server.gpu >= server.least]
    if not server.fits:
        return "less memory for training", [(f"{key}={n:g}",) for n in shares]
    smaller = [n for n in reversed(shares) if n < now and server.shared]
    return "fewer responses at once", [(f"{key}={n:g}",) for n in smaller]


def _doubled(size: int, most: int) -> list[int]:
    """Return 2, 4, 8 … times `size`, up to `most`."""
    return [size * 2**n for n in range(1, 32) if size * 2**n <= most]


def _offload(recipe: Recipe) -> list[Words]:
    """Return the reference, then all frozen models, then all but the actor, then every model."""
    if len(recipe.models) == 1:
        return []
    groups = [
        ["reference"] if "reference" in recipe.models else [],
        [role for role in recipe.models if role not in recipe.trained],
        [role for role in recipe.models if role != "actor"],
        list(recipe.models),
    ]
    found = []
    for roles in groups:
        resident = [role for role in roles if recipe.models[role].offload == "none"]
        words = tuple(f"models.{role}.offload=cpu" for role in resident)
        if words and words not in found:
            found.append(words)
    return found


def _more(recipe: Recipe) -> list[Words]:
    """Return larger worlds, for replicas and, below a node of GPUs, for wider layers."""
    found: list[Words] = []
    for world in _doubled(recipe.world, 16 * recipe.world):
        size: Words = (f"world={world}",)
        if recipe.hardware.gpus < NODE:
            size = (*size, f"hardware.gpus={world}")
        found.append(size)
        if recipe.parallel.tensor < min(world, NODE) and recipe.world < NODE:
            found.append((*size, f"parallel.tensor={min(world, NODE)}", "parallel.sequence=true"))
    return found


def _warnings(plan: Plan) -> Iterator[str]:
    parallel = plan.recipe.parallel
    if plan.spanning("tensor"):
        best = max(n for n in range(1, parallel.tensor + 1) if plan.gpus_per_node % n == 0)
        yield (
            f"tensor groups of {parallel.tensor} ranks reach over several nodes of"
            f" {plan.gpus_per_node}: every layer waits for the network; parallel.tensor={best}"
            " stays inside a node"
        )
    idle = bubble(plan.recipe, plan.iteration.slots(plan.recipe.batch.minibatch))
    if idle > 0.5:
        yield (
            f"the pipeline idles {idle:.0%} of its busy time: more micro-batches (a larger"
            " batch.minibatch, smaller ones)"
        )
