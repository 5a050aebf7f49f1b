"""The calls of one iteration, counted: the algorithm's page runs on made-up rows, with roles that
return zeros of the right shape and note each call.

The page runs as one replica that has the rows of all, two tokens each. No model is built, no file
is read, no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.recipe import registry
from gipo_megatron.recipe.schema import ROLES, Recipe
from gipo_megatron.roles import SingleReplica
from gipo_megatron.specs import Sampling, base_role
from gipo_megatron.types import (
    BatchLoss,
    CriticOutput,
    Pairs,
    Prompts,
    Rollout,
    Rows,
    Sequences,
    TokenStats,
    Update,
)

LATE = 10**9  # a step after every warm-up
PROBE_ROWS = 16
BATCH, PROBE, DATASET = "batch", "probe", "dataset"


@dataclass(frozen=True)
class Call:
    """One call of a role, or several of the same name added up. Counts are of all replicas."""

    name: str  # as a plan prints it
    verb: str  # build | generate | forward | update | save
    role: str
    rows: int = 0
    sequences: int = 0  # of the rows; a pair has two
    count: int = 1
    sampling: Sampling | None = None  # of `generate`
    reads: str = BATCH  # the iteration's batch, the probe, or the whole dataset

    def __add__(self, other: Call) -> Call:
        return replace(
            self,
            rows=self.rows + other.rows,
            sequences=self.sequences + other.sequences,
            count=self.count + other.count,
        )


@dataclass(frozen=True)
class Iteration:
    """All calls of an algorithm's roles, in order."""

    built: tuple[str, ...]  # roles
    once: tuple[Call, ...]  # before the first iteration, by roles that are freed afterwards
    calls: tuple[Call, ...]  # of one iteration


def added_up(items: Iterable[Any]) -> list[Any]:
    """Items (calls, or their phases) of the same name as one, in the order of the first of each."""
    found: dict[str, Any] = {}
    for item in items:
        found[item.name] = found[item.name] + item if item.name in found else item
    return list(found.values())


def count(recipe: Recipe) -> Iteration:
    """Run one iteration of the recipe's algorithm.

    Raises UserError where its page does not run on made-up rows.
    """
    runtime = Runtime(recipe)
    page = build(recipe, runtime)
    try:
        page.step(LATE)
    except Exception as error:
        raise UserError(
            f"algorithm {recipe.algorithm['name']!r} does not run on made-up rows:"
            f" {type(error).__name__}: {error}",
            where="algorithm.name",
            fix="a plan calls `step` once, with roles that return zeros and rows of two tokens",
        ) from error
    notes = runtime.notes
    return Iteration(
        built=tuple(runtime.built),
        once=tuple(note for note in notes if note.reads == DATASET),
        calls=tuple(note for note in notes if note.reads != DATASET),
    )


def build(recipe: Recipe, runtime: Runtime) -> Any:
    """The recipe's page. A reward that calls no model is not called, as it may need real text."""
    page = registry.build("algorithm", recipe.algorithm, runtime)
    for f in registry.component_fields(type(page)):
        component = getattr(page, f.name)
        if (head := getattr(component, "head", None)) is not None:
            runtime.groups = head.num_groups
        objects = [x.metadata["runtime"] for x in registry.runtime_fields(type(component))]
        if f.metadata["slot"] == "reward" and "reward_models" not in objects:
            component.raw = lambda rollout: (torch.zeros(len(rollout)), {})
    return page


# ----------------------------------------------------------------------------------- made-up rows


class Probe(Sequences):
    """The fixed rows on which label changes are counted."""


def sequences(count: int, kind: type[Sequences] = Sequences) -> Sequences:
    """Rows of one prompt token and one response token."""
    ones = torch.ones(count, dtype=torch.long)
    mask = torch.tensor([[False, True]]).repeat(count, 1)
    return kind(mask.long(), mask, ones, 2 * ones, torch.arange(count))


def pairs(count: int) -> Pairs:
    return Pairs(sequences(count), sequences(count), ("",) * count)


def prompts(count: int, responses: int, sources: tuple[str, ...]) -> Prompts:
    """Each of `count` prompts, one token long, `responses` times."""
    ids = torch.arange(count * responses)
    return Prompts(
        tokens=torch.zeros(len(ids), 1, dtype=torch.long),
        lengths=torch.ones_like(ids),
        prompt_id=ids // responses,
        sample_id=ids,
        source=tuple(sources[i // responses % len(sources)] for i in ids.tolist()),
        extras=({"prompt": ""},) * len(ids),
    )


# --------------------------------------------------------------------------------- runtime objects


@dataclass
class CountingRole:
    """Any role: all methods of roles.py."""

    role: str
    runtime: Runtime
    reads: str = BATCH

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """A response of one token to each prompt."""
        size = len(prompts)
        self._note(Call("rollout", "generate", self.role, size, size, sampling=sampling))
        rows = sequences(size)
        return Rollout(
            tokens=rows.tokens,
            mask=rows.mask,
            prompt_lengths=rows.prompt_lengths,
            finished=torch.ones(size, dtype=torch.bool),
            generation_logprobs=torch.zeros(size, 2),
            response_text=("",) * size,
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            source=prompts.source,
            extras=prompts.extras,
        )

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        zeros = self._forward("log-probs", batch)
        return TokenStats(zeros, zeros)

    def refer(self, split: str, pairs: Pairs) -> Pairs:
        """Log-probs of pairs, which an update then reads."""
        self.logprobs(pairs)
        return pairs

    def evaluate(self, batch: Rows) -> CriticOutput:
        zeros, groups = self._forward("values", batch), self.runtime.groups
        return CriticOutput(zeros, zeros.new_zeros(len(zeros), groups) if groups else None)

    def score(self, batch: Rows) -> Tensor:
        return self._forward("scores", batch)[:, 0]

    def features(self, batch: Rows, position: str) -> Tensor:
        return self._forward("features", batch)[:, :1]

    def update(self, *parts: tuple[Rows, BatchLoss]) -> Update:
        rows = sum(len(batch) for batch, _ in parts)
        read = sum(len(batch.sequences) for batch, _ in parts)
        self._note(Call(f"{self.role} update", "update", self.role, rows, read))
        return Update({})

    def _forward(self, what: str, batch: Rows) -> Tensor:
        """Zeros [b, T]."""
        name, reads = f"{self.role} {what}", self.reads
        if isinstance(batch, Probe):
            name, reads = "group probe", PROBE
        elif reads == DATASET:
            name = f"{self.role}, all pairs, once"
        rows = batch.sequences
        self._note(Call(name, "forward", self.role, len(batch), len(rows), reads=reads))
        return torch.zeros(rows.tokens.shape)

    def _note(self, call: Call) -> None:
        self.runtime.notes.append(call)


class Runtime(dict[str, Any]):
    """What pages and components ask for by name, made when it is first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.built: list[str] = []
        self.notes: list[Call] = []
        self.groups = 0  # of the group head on the critic's trunk; 0: it has none
        self.make = self._providers(recipe)

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Any:
        # held-out rows, the tokenizer and others are of no use to `step`
        self[name] = self.make.get(name, lambda: None)()
        return self[name]

    def _providers(self, recipe: Recipe) -> dict[str, Callable[[], Any]]:
        batch, block = recipe.batch, recipe.algorithm

        def role(name: str) -> CountingRole | None:
            if name not in recipe.models:  # a role that is optional
                return None
            if name == "reference" and block.get("precompute"):
                return CountingRole(name, self, DATASET)
            self.built.append(name)
            return CountingRole(name, self)

        rewards = [name for name in recipe.models if base_role(name) == "reward"]
        # a run reads the names of its sources from the data
        sources = tuple(block.get("group_classifier", {}).get("groups") or ("one", "another"))
        rows = prompts(batch.prompts, batch.responses, sources)
        return {
            **{name: partial(role, name) for name in ROLES},
            "reward_models": lambda: {name: role(name) for name in rewards},
            "dp": SingleReplica,
            "seed": lambda: recipe.run.seed,
            "sources": lambda: sources,
            "max_response": lambda: recipe.data.max_response,
            "minibatch": lambda: batch.minibatch,
            "prompts": lambda: lambda step: rows,
            "examples": lambda: lambda step: sequences(batch.minibatch),
            "pairs": lambda: lambda step: pairs(batch.minibatch),
            "probe": lambda: sequences(PROBE_ROWS, Probe),
            "timer": lambda: lambda name: nullcontext(),
        }
