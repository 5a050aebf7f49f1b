"""Does it fit, and if not, which change is the cheapest that makes it fit: each is tried with the
same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gipo_megatron.errors import UserError
from gipo_megatron.planning.memory import GIB
from gipo_megatron.planning.planner import NODE, Plan, Planner
from gipo_megatron.recipe.schema import Recipe

# more key=value words -> the recipe with them; UserError when that is no recipe
Vary = Callable[[Sequence[str]], Recipe]
RECOMPUTE = ("none", "selective", "full")  # by what is computed again


@dataclass(frozen=True)
class Part:
    """One change: words for the command line, and what they cost."""

    words: tuple[str, ...]
    cost: str


@dataclass(frozen=True)
class Change:
    """Parts, the cheapest first, and the plan that they give together."""

    parts: tuple[Part, ...]
    plan: Plan

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for part in self.parts for word in part.words)


@dataclass(frozen=True)
class Verdict:
    fits: bool | None  # None: nothing to fit into is known
    warnings: tuple[str, ...] = ()
    change: Change | None = None  # the cheapest that fits
    closest: Change | None = None  # when none does: the one that needs least memory


def judge(plan: Plan, planner: Planner, vary: Vary) -> Verdict:
    """The plan against its GPU. Changes are tried alone, from the cheapest to the dearest, then
    added up; the first that fits is named.

    A plan that fits is tried with less recomputation, too.
    """
    warnings = tuple(_warnings(plan))
    if not plan.limit:
        return Verdict(None, warnings)

    def tried(parts: tuple[Part, ...]) -> Change | None:
        try:
            return Change(
                parts, planner.plan(vary([word for part in parts for word in part.words]))
            )
        except UserError:  # does not divide, or is not built
            return None

    if plan.fits:
        return Verdict(True, (*warnings, *_needless(plan, tried)))
    closest: Change | None = None
    for parts in changes(plan.recipe, plan.gpus_per_node):
        change = tried(parts)
        if change is None:
            continue
        if change.plan.fits:
            for part in reversed(parts):  # what is not needed any more, the dearest first
                less = (
                    tried(tuple(kept for kept in change.parts if kept is not part))
                    if len(change.parts) > 1
                    else None
                )
                change = less if less is not None and less.plan.fits else change
            return Verdict(False, warnings, change=change)
        if closest is None or change.plan.heaviest.worst.peak < closest.plan.heaviest.worst.peak:
            closest = change
    return Verdict(False, warnings, closest=closest)


def _needless(plan: Plan, tried: Callable[[tuple[Part, ...]], Change | None]) -> Iterator[str]:
    """Warn of recomputation that the memory does not need, and name the cheapest setting that
    fits."""
    current = plan.recipe.memory.recompute
    for name in RECOMPUTE[: RECOMPUTE.index(current)]:
        change = tried((Part((f"memory.recompute={name}",), ""),))
        if change is not None and change.plan.fits:
            less = change.plan.heaviest.worst
            yield (
                f"memory.recompute={current} computes activations twice without need:"
                f" memory.recompute={name} fits, too ({less.peak / GIB:.1f} GiB in {less.name!r})"
            )
            return


def changes(recipe: Recipe, gpus_per_node: int) -> Iterator[tuple[Part, ...]]:
    """Cheapest first: alone, then each on top of the strongest of all kinds before it."""
    kinds = [
        [Part(words, "smaller matrix products") for words in _smaller_batches(recipe)],
        [Part(words, "activations computed twice") for words in _recompute(recipe)],
        [
            Part(words, "models travel between host and GPU in every iteration")
            for words in _offload(recipe)
        ],
        [
            Part(words, "traffic inside each layer, fewer replicas")
            for words in _tensor(recipe, gpus_per_node)
        ],
        [Part(words, "pipeline bubbles, fewer replicas") for words in _pipeline(recipe)],
        [Part(words, "more GPUs") for words in _more(recipe)],
    ]
    for kind in kinds:
        yield from ((part,) for part in kind)
    so_far: tuple[Part, ...] = ()
    for kind in kinds:
        if so_far:
            yield from ((*so_far, part) for part in kind)
        so_far += tuple(kind[-1:])


def _smaller_batches(recipe: Recipe) -> list[tuple[str, ...]]:
    size = recipe.batch.micro_batch
    return [(f"batch.micro_batch={n}",) for n in range(size - 1, 0, -1) if size % n == 0]


def _recompute(recipe: Recipe) -> list[tuple[str, ...]]:
    return [
        (f"memory.recompute={name}",)
        for name in RECOMPUTE[RECOMPUTE.index(recipe.memory.recompute) + 1 :]
    ]


def _offload(recipe: Recipe) -> list[tuple[str, ...]]:
    """The reference, then models that only answer together with the critic, then every model."""
    if len(recipe.models) == 1:
        return []
    found: list[tuple[str, ...]] = []
    idle = {
        "reference": ["reference"],
        "frozen": [role for role in recipe.models if role not in recipe.trained],
        "but the actor": [role for role in recipe.models if role != "actor"],
        "all": list(recipe.models),
    }
    for roles in idle.values():
        words = tuple(
            f"models.{role}.offload=cpu"
            for role in roles
            if role in recipe.models and recipe.models[role].offload == "none"
        )
        if words and words not in found:
            found.append(words)
    return found


def _tensor(recipe: Recipe, gpus_per_node: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    size = recipe.parallel.tensor * 2
    while size <= min(gpus_per_node, recipe.world):
        found.append((f"parallel.tensor={size}", "parallel.sequence=true"))
        size *= 2
    return found


def _pipeline(recipe: Recipe) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    size = recipe.parallel.pipeline * 2
    while size <= min(recipe.world // recipe.parallel.tensor, recipe.model.architecture.num_layers):
        found.append((f"parallel.pipeline={size}",))
        size *= 2
    return found


def _more(recipe: Recipe) -> list[tuple[str, ...]]:
    """More GPUs, for replicas and, where there was not even a node of them, for wider layers."""
    found: list[tuple[str, ...]] = []
    for world in (recipe.world * more for more in (2, 4, 8, 16)):
        size = (
            (f"world={world}",)
            if recipe.hardware.gpus >= NODE
            else (f"world={world}", f"hardware.gpus={world}")
        )
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
    if parallel.pipeline > 1 and plan.batch.slots * parallel.virtual_pipeline < 2 * (
        parallel.pipeline - 1
    ):
        idle = (parallel.pipeline - 1) / (plan.batch.slots * parallel.virtual_pipeline)
        yield (
            f"the pipeline idles {idle:.0%} of its busy time: more micro-batches (a larger"
            " batch.minibatch, a smaller micro_batch)"
        )
