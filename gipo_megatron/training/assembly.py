"""A checked recipe becomes objects: one table of providers, by the names in `from_runtime`.

A provider runs when a field of the page or of a component first names it (`from_runtime`), so a
recipe builds exactly the models that it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gipo_megatron import registry
from gipo_megatron.algorithms.pair_reference import LiveReference, PrecomputedReference, Split
from gipo_megatron.components.protocols import RolloutServer
from gipo_megatron.components.rollout import VLLMRollout
from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.tokenizer import Tokenizer, check_vocabulary
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.build import Bases, build_engine, snapshot_of
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.recipe.length import num_steps
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.registry import Lazy
from gipo_megatron.specs import Optimisation, Sampling, base_role
from gipo_megatron.training.held_out import HeldOut
from gipo_megatron.types import Pairs, Prompts, Sequences
from gipo_megatron.weights.sources import check_tokenizer, find_tokenizer, locate

Timer = Callable[[str], AbstractContextManager[None]]
# (role, forward | update, tokens of a pass that are not padding, all its tokens) -> nothing
Count = Callable[[str, str, int, int], None]
PROBE_PROMPTS = 16


@dataclass
class Assembly:
    """The parts of a run that a recipe describes."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: Tokenizer
    train: Dataset
    held_out: Dataset
    algorithm: Any
    trained: dict[str, Engine]  # role -> what a checkpoint holds
    sequences_per_step: int
    steps: int  # of the whole run
    notes: list[str]  # warnings that only the weights can give


def assemble(
    recipe: Recipe,
    mesh: Mesh,
    timer: Timer,
    count: Count = lambda *numbers: None,
    closing: ExitStack | None = None,
) -> Assembly:
    """Build the page and all that it uses; nothing is trained yet. Collective.

    closing: ends what the parts started, when it is closed. Raises UserError for what a recipe
    check cannot find.
    """
    given = Providers(recipe, mesh, timer, count, closing or ExitStack())
    if "rollout" in given.components:
        given.components["rollout"].start()
    return Assembly(
        recipe,
        mesh,
        given.tokenizer,
        given.train,
        given.test,
        registry.build("algorithm", recipe.algorithm, given.runtime, given.components),
        {role: given.runtime[role].engine for role in recipe.trained},
        given.rows,
        given.steps,
        given.notes,
    )


class Providers:
    """The table: `runtime` by the names of `from_runtime`, `components` by the page's fields."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, timer: Timer, count: Count, closing: ExitStack
    ) -> None:
        self.recipe, self.mesh, self.dp = recipe, mesh, mesh.data_parallel
        self.count, self.closing = count, closing
        self.notes: list[str] = []
        block, batch = recipe.algorithm, recipe.batch
        page: Any = registry.lookup("algorithm", block["name"])
        self.kind: str = page.data
        loads = {f"models.{role}.load": model.load for role, model in recipe.models.items()}
        self.tokenizer = find_tokenizer(recipe.model.tokenizer, loads)
        vocabulary = recipe.model.architecture.vocab_size
        check_vocabulary(self.tokenizer, vocabulary, where="model.architecture.vocab_size")
        self.train, self.test = self._data("train", self.kind), self._data("test", self.kind)
        # global rows of one iteration, and the optimizer steps made on them
        on_prompts = self.kind == "prompt"
        self.rows = batch.prompts * batch.responses if on_prompts else batch.minibatch
        self.steps = num_steps(recipe, len(self.train))
        self.updates = block.get("epochs", 1) * (self.rows // batch.minibatch)
        self.runtime = Lazy(
            {
                "actor": self._actor,
                "reference": self._reference,
                "critic": self._critic,
                "reward": lambda: self._reward("reward"),
                "reward_models": self._reward_models,
                "gold": self._gold,
                "dp": lambda: self.dp,
                "seed": lambda: recipe.run.seed,
                "sources": lambda: tuple(sorted({*self.train.sources, *self.test.sources})),
                "max_response": lambda: recipe.data.max_response,
                "minibatch": lambda: batch.minibatch,
                "timer": lambda: timer,
                "tokenizer": lambda: self.tokenizer,
                "prompts": lambda: self._prompts,
                "pairs": lambda: self._pairs,
                "chosen": lambda: self._chosen if self.train.answered else None,
                "examples": self._examples,
                "probe": self._probe,
                "held_out": self._held_out,
                "sampling": self._sampling,
                "connect": lambda: self._connect,
            }
        )
        self.components = Lazy(
            {
                f.name: partial(registry.build, f.metadata["slot"], block[f.name], self.runtime)
                for f in registry.component_fields(page)
            }
        )

    # --------------------------------------------------------------------------------------- models

    def _settings(self, role: str) -> dict[str, Any]:
        """Return what `build_engine` takes; the weights are located and their tokenizer checked."""
        recipe, model, key = self.recipe, self.recipe.models[role], f"models.{role}.load"
        load = self._located(role)
        if load != "random":
            template = recipe.data.template
            self.notes += check_tokenizer(Path(load), self.tokenizer, template, key)
        adapter = recipe.model.adapter if role in recipe.trained else None
        return {
            **self._bases.settings(role, load, adapter),
            "role": role,
            "mesh": self.mesh,
            "architecture": recipe.model.architecture,
            "precision": recipe.precision,
            "load": load,
            "micro_batch": recipe.batch.micro_batch,
            "micro_tokens": recipe.batch.micro_tokens,
            "count": partial(self.count, role),
            "seed": recipe.run.seed,
            "optimisation": self._optimisation(role) if role in recipe.trained else None,
            "recompute": recipe.memory.recompute,
            "offload": model.offload,
        }

    def _located(self, role: str) -> str:
        load = self.recipe.models[role].load
        return load if load == "random" else str(locate(load, f"models.{role}.load"))

    @cached_property
    def _bases(self) -> Bases:
        """Those of the trained roles' adapters, which others may share."""
        bases = Bases(self.recipe.run.seed)
        for role in self.recipe.trained:
            bases.settings(role, self._located(role), self.recipe.model.adapter)
        return bases

    def _optimisation(self, role: str) -> Optimisation:
        model, total = self.recipe.models[role], self.steps * self.updates
        assert model.lr is not None, "the recipe check requires it"
        if model.schedule != "constant" and total <= model.warmup_steps:
            raise UserError(
                f"the {model.schedule} schedule ends at step {total}, before its warm-up of"
                f" {model.warmup_steps} steps does",
                where=f"models.{role}.warmup_steps",
                fix="fewer warm-up steps, a longer run, or schedule: constant",
            )
        return Optimisation(
            lr=model.lr,
            schedule=model.schedule,
            warmup_steps=model.warmup_steps,
            total_steps=total,
            weight_decay=model.weight_decay,
            clip_grad=model.clip_grad,
        )

    @property
    def _temperature(self) -> float:
        """The sampler's, at which all log-probs are computed, too."""
        if "rollout" not in self.components:
            return 1.0
        return float(self.components["rollout"].temperature)

    def _actor(self) -> MegatronActor:
        t = self.tokenizer
        engine = build_engine(**self._settings("actor"))
        return MegatronActor(engine, t.eos_id, t.pad_id, t.decode, self._temperature)

    def _reference(self) -> MegatronReference | LiveReference | PrecomputedReference:
        """A page on pairs that has the key `precompute` compares with a reference of pairs."""
        precompute = self.recipe.algorithm.get("precompute")
        if precompute is None:
            return self._policy_reference()
        return self._precomputed() if precompute else LiveReference(self._policy_reference())

    def _policy_reference(self) -> MegatronReference:
        """With `offload: cpu` only a host copy, swapped into the actor's place for each call; on a
        base, which stays on the device, a model of its own."""
        settings = self._settings("reference")
        if settings["offload"] != "cpu" or settings["base"] is not None:
            return MegatronReference(build_engine(**settings), self._temperature)
        live: Engine = self.runtime["actor"].engine
        copied = snapshot_of(live, settings["load"], "reference", settings["seed"])
        return MegatronReference(live, self._temperature, copied)

    def _precomputed(self) -> PrecomputedReference:
        """A reference whose model is built later and not kept. Its weights are checked now."""
        recipe, train, size = self.recipe, self.train, self.rows
        settings = self._settings("reference")
        steps = min(self.steps, -(-len(train) // size))
        used = sorted({row for step in range(steps) for row in train.order(step, size)})
        held_out = self._held_out().indices if recipe.run.eval_every else []
        identity = (
            recipe.models["reference"].load,
            recipe.data,
            self.tokenizer.fingerprint,
            train.fingerprint,
            self.test.fingerprint,
        )
        return PrecomputedReference(
            lambda: MegatronReference(build_engine(**settings), self._temperature),
            {
                "train": Split(used, train.pairs_at),
                "held_out": Split(held_out, self.test.pairs_at),
            },
            self.dp,
            size,
            identity=repr(identity),
        )

    def _critic(self) -> MegatronCritic | None:
        """The group classifier chooses the group head. None for a recipe that trains no critic."""
        if "critic" not in self.recipe.trained:
            return None
        parts = self.components
        group = parts["group_classifier"].head if "group_classifier" in parts else None
        return MegatronCritic(build_engine(**self._settings("critic"), group=group))

    def _reward(self, role: str) -> MegatronRewardModel:
        return MegatronRewardModel(build_engine(**self._settings(role)))

    def _reward_models(self) -> dict[str, MegatronRewardModel]:
        roles = [role for role in self.recipe.models if base_role(role) == "reward"]
        return {role: self._reward(role) for role in roles}

    def _gold(self) -> MegatronRewardModel | None:
        return self._reward("gold") if "gold" in self.recipe.models else None

    # ----------------------------------------------------------------------------------------- data

    def _data(self, split: str, kind: str) -> Dataset:
        data, run = self.recipe.data, self.recipe.run
        needed = split == "train" or run.eval_every > 0
        return load_data(data, self.tokenizer, split, run.seed, kind, needed)

    def _prompts(self, step: int) -> Prompts:
        batch, dp = self.recipe.batch, self.dp
        return self.train.prompts(step, batch.prompts, batch.responses, dp.rank, dp.size)

    def _pairs(self, step: int) -> Pairs:
        return self.train.pairs(step, self.rows, self.dp.rank, self.dp.size)

    def _chosen(self, prompt_ids: Tensor) -> Sequences:
        return self.train.answers(prompt_ids.tolist())

    def _examples(self) -> Callable[[int], Sequences] | None:
        """SFT rows, a minibatch each. A page on other data mixes them in where its weight `ptx` is
        above 0, else None."""
        rows, size, dp = self.train, self.recipe.batch.minibatch, self.dp
        if self.kind != "sft":
            if self.recipe.algorithm["ptx"] <= 0:
                return None
            rows = self._data("train", "sft")
        return lambda step: rows.examples(step, size, dp.rank, dp.size)

    def _probe(self) -> Sequences:
        """The first held-out prompts, or training prompts where none are held out: label changes
        between iterations are counted on them."""
        data = self.test if len(self.test) else self.train
        count = min(PROBE_PROMPTS, len(data))
        rows, _ = data.prompts_at(range(count), self.dp.rank, self.dp.size)
        no_response = rows.tokens.new_zeros(rows.tokens.shape).bool()
        return Sequences(rows.tokens, no_response, rows.lengths, rows.lengths, rows.prompt_id)

    def _held_out(self) -> HeldOut:
        return HeldOut(self.test, self.dp, self.recipe.run.eval_prompts, self.rows)

    def _sampling(self) -> Sampling:
        """Return how held-out responses are drawn: with the same noise every time."""
        drawn = self.recipe.evaluation
        return Sampling(
            max_response=self.recipe.data.max_response,
            temperature=drawn.temperature,
            top_k=drawn.top_k,
            top_p=drawn.top_p,
            repetition_penalty=drawn.repetition_penalty,
            seed=self.recipe.run.seed,
        )

    def _connect(self, sampler: VLLMRollout) -> RolloutServer:
        """Start the sampler's server with the actor's model."""
        # imported here: runs without a server need no HTTP client
        from gipo_megatron.training.rollout_server import connect, trained_policy

        policy, folder = trained_policy(self.recipe, self.tokenizer), Path(self.recipe.run.dir)
        return connect(sampler, policy, self.mesh, folder / "vllm", self.closing)
