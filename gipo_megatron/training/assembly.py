"""A checked recipe becomes objects: data, roles, algorithm. The only place that knows which role a
recipe key belongs to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from gipo_megatron.algorithms.dpo_reference import (
    LiveReference,
    PairReference,
    PrecomputedReference,
    Split,
)
from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.planted import gold_reward
from gipo_megatron.data.tokenizer import Tokenizer, check_vocabulary
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.build import build_engine, snapshot_of
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.recipe import registry
from gipo_megatron.recipe.schema import ModelConfig, Recipe
from gipo_megatron.specs import HeadSpec, Optimisation, Sampling
from gipo_megatron.training.held_out import HeldOut
from gipo_megatron.types import Sequences
from gipo_megatron.weights.sources import check_tokenizer, find_tokenizer, locate

Phase = Callable[[str], AbstractContextManager[None]]
DATA_KIND = {"sft": "sft", "reward_model": "preference", "dpo": "preference", "ppo": "prompt"}


@dataclass
class Assembly:
    """Everything a run needs that a recipe describes."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: Tokenizer
    train: Dataset
    held_out: Dataset
    algorithm: Any
    trained: dict[str, Engine]  # role -> what a checkpoint holds
    sequences_per_step: int
    notes: list[str] = field(default_factory=list)


def assemble(recipe: Recipe, mesh: Mesh, phase: Phase) -> Assembly:
    """Build it all; nothing is trained yet. Collective. Raises UserError for whatever a recipe
    check cannot see."""
    name = recipe.algorithm["name"]
    loads = {f"models.{role}.load": model.load for role, model in recipe.models.items()}
    tokenizer = find_tokenizer(recipe.model.tokenizer, loads)
    check_vocabulary(
        tokenizer, recipe.model.architecture.vocab_size, where="model.architecture.vocab_size"
    )
    kind = DATA_KIND[name]
    train = load_data(recipe.data, tokenizer, "train", recipe.run.seed, kind)
    held_out = load_data(recipe.data, tokenizer, "test", recipe.run.seed, kind)
    roles = RoleBuilder(recipe, mesh, tokenizer)
    build = {
        "sft": _assemble_sft,
        "reward_model": _assemble_reward_model,
        "dpo": _assemble_dpo,
        "ppo": _assemble_ppo,
    }[name]
    parts = build(recipe, mesh, tokenizer, train, held_out, roles, phase)
    parts.notes += roles.notes
    return parts


@dataclass
class RoleBuilder:
    """models.<role> of the recipe -> a role."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: Tokenizer
    sampler_temperature: float = 1.0
    # what the roles' checkpoints say that a run should warn of
    notes: list[str] = field(default_factory=list)

    def _common(self, role: str) -> dict[str, Any]:
        recipe, model = self.recipe, self._model(role)
        load = "random"
        if model.load != load:
            folder = locate(model.load, f"models.{role}.load")
            self.notes += check_tokenizer(
                folder, self.tokenizer, recipe.data.template, f"models.{role}.load"
            )
            load = str(folder)
        return {
            "role": role,
            "mesh": self.mesh,
            "architecture": recipe.model.architecture,
            "precision": recipe.precision,
            "micro_batch": recipe.batch.micro_batch,
            "seed": recipe.run.seed,
            "offload": model.offload,
            "load": load,
        }

    def _model(self, role: str) -> ModelConfig:
        return self.recipe.models[role]

    def _optimisation(self, role: str, total_steps: int) -> Optimisation:
        model = self._model(role)
        assert model.lr is not None, "the recipe check asks for it"
        if model.schedule != "constant" and total_steps <= model.warmup_steps:
            raise UserError(
                f"the {model.schedule} schedule ends at step {total_steps}, before its warm-up of"
                f" {model.warmup_steps} steps does",
                where=f"models.{role}.warmup_steps",
                fix="fewer warm-up steps, more run.steps, or schedule: constant",
            )
        return Optimisation(
            lr=model.lr,
            schedule=model.schedule,
            warmup_steps=model.warmup_steps,
            total_steps=total_steps,
            weight_decay=model.weight_decay,
            clip_grad=model.clip_grad,
        )

    def actor(self, total_steps: int) -> MegatronActor:
        tokenizer = self.tokenizer
        engine = build_engine(
            **self._common("actor"),
            recompute=self.recipe.memory.recompute,
            optimisation=self._optimisation("actor", total_steps),
        )
        return MegatronActor(
            engine,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            decode=tokenizer.decode,
            temperature=self.sampler_temperature,
        )

    def reference(self, live: MegatronActor) -> MegatronReference:
        """With `offload: cpu` only a host copy, swapped into the actor's place for each call."""
        common = self._common("reference")
        if self._model("reference").offload != "cpu":
            return MegatronReference(build_engine(**common), self.sampler_temperature)
        copy = snapshot_of(live.engine, common["load"], "reference", common["seed"])
        return MegatronReference(live.engine, self.sampler_temperature, copy)

    def passing_reference(self) -> Callable[[], MegatronReference]:
        """A reference to be made later and not kept: with a model of its own, wherever the actor
        stands by then."""
        # now: what is wrong with the weights should be said before the run begins
        arguments = self._common("reference")
        return lambda: MegatronReference(build_engine(**arguments), self.sampler_temperature)

    def critic(self, head: HeadSpec | None, total_steps: int) -> MegatronCritic:
        optimisation = self._optimisation("critic", total_steps)
        return MegatronCritic(
            build_engine(
                **self._common("critic"),
                recompute=self.recipe.memory.recompute,
                optimisation=optimisation,
                group=head,
            )
        )

    def reward(self, role: str = "reward", total_steps: int | None = None) -> MegatronRewardModel:
        optimisation = None if total_steps is None else self._optimisation(role, total_steps)
        return MegatronRewardModel(
            build_engine(
                **self._common(role),
                recompute=self.recipe.memory.recompute,
                optimisation=optimisation,
            )
        )


def _assemble_sft(
    recipe: Recipe,
    mesh: Mesh,
    tokenizer: Tokenizer,
    train: Dataset,
    held_out: Dataset,
    roles: RoleBuilder,
    phase: Phase,
) -> Assembly:
    dp, batch = mesh.data_parallel, recipe.batch.minibatch
    actor = roles.actor(recipe.run.steps)
    runtime = {
        "actor": actor,
        "timer": phase,
        "held_out": HeldOut(held_out, dp, recipe.run.eval_prompts, batch),
        "examples": lambda step: train.examples(step, batch, dp.rank, dp.size),
    }
    algorithm = registry.build("algorithm", recipe.algorithm, runtime)
    return Assembly(
        recipe, mesh, tokenizer, train, held_out, algorithm, {"actor": actor.engine}, batch
    )


def _assemble_reward_model(
    recipe: Recipe,
    mesh: Mesh,
    tokenizer: Tokenizer,
    train: Dataset,
    held_out: Dataset,
    roles: RoleBuilder,
    phase: Phase,
) -> Assembly:
    dp, batch = mesh.data_parallel, recipe.batch.minibatch
    reward = roles.reward(total_steps=recipe.run.steps)
    runtime = {
        "reward": reward,
        "timer": phase,
        "held_out": HeldOut(held_out, dp, recipe.run.eval_prompts, batch),
        "pairs": lambda step: train.pairs(step, batch, dp.rank, dp.size),
    }
    algorithm = registry.build("algorithm", recipe.algorithm, runtime)
    return Assembly(
        recipe, mesh, tokenizer, train, held_out, algorithm, {"reward": reward.engine}, batch
    )


def _assemble_dpo(
    recipe: Recipe,
    mesh: Mesh,
    tokenizer: Tokenizer,
    train: Dataset,
    held_out: Dataset,
    roles: RoleBuilder,
    phase: Phase,
) -> Assembly:
    dp, batch, steps = mesh.data_parallel, recipe.batch.minibatch, recipe.run.steps
    actor = roles.actor(steps)
    rows = HeldOut(held_out, dp, recipe.run.eval_prompts, batch)
    reference: PairReference
    if recipe.algorithm["precompute"]:
        one_epoch = -(-len(train) // batch)
        used = sorted(
            {row for step in range(min(steps, one_epoch)) for row in train.order(step, batch)}
        )
        splits = {
            "train": Split(used, train.pairs_at),
            "held_out": Split(rows.indices if recipe.run.eval_every else [], held_out.pairs_at),
        }
        told_by = (
            recipe.models["reference"].load,
            recipe.data,
            tokenizer.fingerprint,
            train.fingerprint,
            held_out.fingerprint,
        )
        reference = PrecomputedReference(
            roles.passing_reference(), splits, dp, batch, identity=repr(told_by)
        )
    else:
        reference = LiveReference(roles.reference(actor))
    runtime = {
        "actor": actor,
        "reference": reference,
        "timer": phase,
        "held_out": HeldOut(held_out, dp, recipe.run.eval_prompts, batch),
        "pairs": lambda step: train.pairs(step, batch, dp.rank, dp.size),
    }
    algorithm = registry.build("algorithm", recipe.algorithm, runtime)
    return Assembly(
        recipe, mesh, tokenizer, train, held_out, algorithm, {"actor": actor.engine}, batch
    )


def _assemble_ppo(
    recipe: Recipe,
    mesh: Mesh,
    tokenizer: Tokenizer,
    train: Dataset,
    held_out: Dataset,
    roles: RoleBuilder,
    phase: Phase,
) -> Assembly:
    dp, batch, block = mesh.data_parallel, recipe.batch, recipe.algorithm
    sequences = batch.prompts * batch.responses
    updates = block["epochs"] * (sequences // batch.minibatch)
    sources = tuple(sorted({*train.sources, *held_out.sources}))
    runtime: dict[str, Any] = {
        "dp": dp,
        "seed": recipe.run.seed,
        "sources": sources,
        "max_response": recipe.data.max_response,
    }
    # The head is the classifier's to choose and the critic's to build, so the classifier is asked
    # before there is a critic.
    head = registry.build("group_classifier", block["group_classifier"], runtime).head
    roles.sampler_temperature = registry.build("rollout", block["rollout"], runtime).temperature

    actor = roles.actor(recipe.run.steps * updates)
    critic = None
    if "critic" in recipe.trained:
        critic = roles.critic(head, recipe.run.steps * updates)
    reward_models = {
        role: roles.reward(role)
        for role in recipe.models
        if role == "reward" or role.startswith("reward_")
    }
    reference = roles.reference(actor)
    evaluation = recipe.evaluation
    sampling = Sampling(
        max_response=recipe.data.max_response,
        temperature=evaluation.temperature,
        top_k=evaluation.top_k,
        top_p=evaluation.top_p,
        repetition_penalty=evaluation.repetition_penalty,
        seed=recipe.run.seed,
    )
    gold = gold_reward if recipe.data.format == "planted" else None
    runtime |= {
        "actor": actor,
        "critic": critic,
        "reference": reference,
        "reward_models": reward_models,
        "minibatch": batch.minibatch,
        "timer": phase,
        "held_out": HeldOut(held_out, dp, recipe.run.eval_prompts, sequences, gold),
        "sampling": sampling,
        "prompts": lambda step: train.prompts(
            step, batch.prompts, batch.responses, dp.rank, dp.size
        ),
        "examples": _ptx_rows(recipe, mesh, tokenizer),
        "probe": _probe(held_out, mesh),
    }
    algorithm = registry.build("algorithm", block, runtime)
    trained = {"actor": actor.engine}
    if critic is not None:
        trained["critic"] = critic.engine
    return Assembly(recipe, mesh, tokenizer, train, held_out, algorithm, trained, sequences)


def _ptx_rows(
    recipe: Recipe, mesh: Mesh, tokenizer: Tokenizer
) -> Callable[[int], Sequences] | None:
    """SFT rows from the same data, one minibatch an optimizer step; None where no ptx loss is asked
    for."""
    if recipe.algorithm["ptx"] <= 0:
        return None
    dp, size = mesh.data_parallel, recipe.batch.minibatch
    rows = load_data(recipe.data, tokenizer, "train", recipe.run.seed, "sft")
    return lambda step: rows.examples(step, size, dp.rank, dp.size)


def _probe(held_out: Dataset, mesh: Mesh, prompts: int = 16) -> Sequences:
    """The first held-out prompts, alone: label changes between iterations are counted on them."""
    dp = mesh.data_parallel
    rows, _ = held_out.prompts_at(range(min(prompts, len(held_out))), dp.rank, dp.size)
    return Sequences(
        rows.tokens,
        rows.tokens.new_zeros(rows.tokens.shape).bool(),
        rows.lengths,
        rows.lengths,
        rows.prompt_id,
    )
