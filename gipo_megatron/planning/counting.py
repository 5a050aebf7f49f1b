"""The calls of one iteration: the algorithm's page runs on made-up rows, with roles that return
zeros of the right shape and note each call.

The page runs as one replica that has the rows of all, two tokens each. No model is built, no file
is read, no random number is drawn.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gipo_megatron import registry
from gipo_megatron.components.rollout import VLLMRollout
from gipo_megatron.errors import UserError
from gipo_megatron.planning.arithmetic import BATCH, DATASET, PROBE, Call, Iteration
from gipo_megatron.recipe.schema import ROLES, Recipe
from gipo_megatron.registry import Lazy
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


def count(recipe: Recipe) -> Iteration:
    """Run one iteration of the recipe's algorithm.

    Raises UserError where its page does not run on made-up rows.
    """
    table = Table(recipe)
    page = table.page()
    try:
        page.step(LATE)
        if "gold" in table.built:  # at evaluations: it needs memory, but no time of an iteration
            table.runtime["gold"].score(sequences(0))
    except Exception as error:
        raise UserError(
            f"algorithm {recipe.algorithm['name']!r} does not run on made-up rows:"
            f" {type(error).__name__}: {error}",
            where="algorithm.name",
            fix="a plan calls `step` once, with roles that return zeros and rows of two tokens",
        ) from error
    once = tuple(call for call in table.notes if call.reads == DATASET)
    calls = tuple(call for call in table.notes if call.reads != DATASET)
    return Iteration(recipe, tuple(table.built), once, calls)


# ----------------------------------------------------------------------------------- made-up rows


class Probe(Sequences):
    """The fixed rows on which label changes are counted."""


def sequences(count: int, kind: type[Sequences] = Sequences) -> Sequences:
    """Return rows of one prompt token and one response token."""
    ones = torch.ones(count, dtype=torch.long)
    mask = torch.tensor([[False, True]]).repeat(count, 1)
    return kind(mask.long(), mask, ones, 2 * ones, torch.arange(count))


def pairs(count: int) -> Pairs:
    return Pairs(sequences(count), sequences(count), ("",) * count)


def prompts(count: int, responses: int, sources: tuple[str, ...]) -> Prompts:
    """Return each of `count` prompts, one token long, `responses` times."""
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
    """A role of any kind: it has all methods of roles.py, and `refer` of a reference of pairs."""

    role: str
    table: Table
    reads: str = BATCH
    version: int = 0
    end_ids: tuple[int, ...] = ()

    def generate(
        self, prompts: Prompts, sampling: Sampling, server: VLLMRollout | None = None
    ) -> Rollout:
        """Return a response of one token to each prompt."""
        size = len(prompts)
        call = Call("rollout", "generate", self.role, size, size, sampling=sampling, server=server)
        self._note(call)
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
        """Return the pairs, which an update then reads."""
        self.logprobs(pairs)
        return pairs

    def evaluate(self, batch: Rows) -> CriticOutput:
        zeros, groups = self._forward("values", batch), self.table.groups
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
        """Note a forward pass; return zeros [b, T]."""
        name, reads = f"{self.role} {what}", self.reads
        if isinstance(batch, Probe):
            name, reads = "group probe", PROBE
        elif reads == DATASET:
            name = f"{self.role}, all pairs, once"
        rows = batch.sequences
        self._note(Call(name, "forward", self.role, len(batch), len(rows), reads=reads))
        return torch.zeros(rows.tokens.shape)

    def _note(self, call: Call) -> None:
        self.table.notes.append(call)


@dataclass
class CountingServer:
    """The server of a sampler (serving/rollouts.py)."""

    sampler: VLLMRollout

    def respond(self, actor: CountingRole, prompts: Prompts, sampling: Sampling) -> Rollout:
        return actor.generate(prompts, sampling, self.sampler)


class Table:
    """The objects that pages and components name (training/assembly.py has the same names)."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.built: list[str] = []
        self.notes: list[Call] = []
        self.groups = 0  # of the group head on the critic's trunk; 0: it has none
        batch, block = recipe.batch, recipe.algorithm
        # a run reads the names of its sources from the data
        sources = tuple(block.get("group_classifier", {}).get("groups") or ("one", "another"))
        rows = prompts(batch.prompts, batch.responses, sources)
        evaluation = ("held_out", "sampling", "tokenizer")  # of no use to `step`
        self.runtime = Lazy(
            {
                **{role: partial(self._role, role) for role in ROLES},
                **{name: lambda: None for name in evaluation},
                "reward_models": self._reward_models,
                "connect": lambda: CountingServer,
                "dp": SingleReplica,
                "seed": lambda: recipe.run.seed,
                "sources": lambda: sources,
                "max_response": lambda: recipe.data.max_response,
                "minibatch": lambda: batch.minibatch,
                "timer": lambda: lambda name: nullcontext(),
                "prompts": lambda: lambda step: rows,
                "pairs": lambda: lambda step: pairs(batch.minibatch),
                "examples": lambda: lambda step: sequences(batch.minibatch),
                "probe": lambda: sequences(PROBE_ROWS, Probe),
                "chosen": lambda: lambda ids: sequences(len(ids)),
            }
        )

    def page(self) -> Any:
        """Build the recipe's page. A reward without a model may need real text, so it is not
        called."""
        page = registry.build("algorithm", self.recipe.algorithm, self.runtime)
        for f in registry.component_fields(type(page)):
            component = getattr(page, f.name)
            if (head := getattr(component, "head", None)) is not None:
                self.groups = head.num_groups
            objects = [x.metadata["runtime"] for x in registry.runtime_fields(type(component))]
            if f.metadata["slot"] == "reward" and "reward_models" not in objects:
                component.raw = lambda rollout: (torch.zeros(len(rollout)), {})
        return page

    def _role(self, role: str) -> CountingRole | None:
        """Return None for an optional role that the recipe does not use."""
        if role not in self.recipe.models:
            return None
        if role == "reference" and self.recipe.algorithm.get("precompute"):
            return CountingRole(role, self, DATASET)  # built later, and not kept
        self.built.append(role)
        return CountingRole(role, self)

    def _reward_models(self) -> dict[str, CountingRole | None]:
        roles = [role for role in self.recipe.models if base_role(role) == "reward"]
        return {role: self._role(role) for role in roles}
