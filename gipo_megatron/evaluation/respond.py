"""Responses of the policies on Megatron, one policy at a time, each with its scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.components.protocols import Sampler
from gipo_megatron.components.tracker import GroupTracker
from gipo_megatron.conversion.verify import release
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe
from gipo_megatron.evaluation.types import Response, TaskPrompt
from gipo_megatron.megatron.build import Bases, build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.megatron.stored import read_state
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.types import Prompts, Rollout
from gipo_megatron.weights.checkpoints import read_meta, weights_kind


@dataclass
class ResponseScores:
    """The models that score every response when it is drawn, as far as the recipe names them."""

    reward: MegatronRewardModel | None = None
    reference: MegatronReference | None = None
    critic: MegatronCritic | None = None
    ranks: tuple[float, ...] = ()  # of the critic's groups, 1 for the high one

    def of(self, actor: MegatronActor, rollout: Rollout) -> dict[str, Tensor]:
        """Return [B] each: score (raw), kl (sum over response tokens of log π - log π_ref, nats),
        p_high."""
        values = {}
        if self.reward is not None:
            values["score"] = self.reward.score(rollout)
        if self.reference is not None:
            policy, reference = actor.logprobs(rollout), self.reference.logprobs(rollout)
            values["kl"] = ops.sequence_sum(policy.logprobs - reference.logprobs, rollout.mask)
        if self.critic is not None:
            logits = self.critic.evaluate(rollout).group_logits
            assert logits is not None
            values["p_high"] = (logits.softmax(-1) * logits.new_tensor(self.ranks)).sum(1)
        return values


@dataclass
class Responder:
    """The policies of one recipe on one mesh. Every method is collective.

    `weights`: recipe key -> folder. `ids`: prompt_id -> tokens. Raises UserError for a critic
    without groups, or without a record of which group is the high one.
    """

    recipe: EvaluationRecipe
    mesh: Mesh
    tokenizer: Tokenizer
    weights: Mapping[str, Path]
    ids: Mapping[str, list[int]]
    sampler: Sampler

    def __post_init__(self) -> None:
        key = "models.critic.load"
        self._head: HeadSpec | None = None
        if "critic" in self.recipe.models:
            self._head, self._ranks = group_head(self.weights[key], key)
        self._bases = Bases()
        for key, folder in self.weights.items():
            section, _, name = key.removesuffix(".load").partition(".")
            self._bases.settings("actor" if section == "policies" else name, str(folder))

    def _engine(self, role: str, key: str, group: HeadSpec | None = None) -> Engine:
        recipe, load = self.recipe, str(self.weights[key])
        return build_engine(
            role,
            self.mesh,
            recipe.model.architecture,
            recipe.precision,
            micro_batch=recipe.batch.micro_batch,
            micro_tokens=recipe.batch.micro_tokens,
            load=load,
            group=group,
            **self._bases.settings(role, load),
        )

    def load_scores(self) -> ResponseScores:
        """Load the scoring models; they stay in memory for all policies."""
        scores = ResponseScores()
        engines = {
            role: self._engine(
                role, f"models.{role}.load", self._head if role == "critic" else None
            )
            for role in ("reward", "reference", "critic")
            if role in self.recipe.models
        }
        if "reward" in engines:
            scores.reward = MegatronRewardModel(engines["reward"])
        if "reference" in engines:
            scores.reference = MegatronReference(engines["reference"])
        if "critic" in engines:
            scores.critic, scores.ranks = MegatronCritic(engines["critic"]), self._ranks
        return scores

    def responses(
        self, policy: str, prompts: Sequence[TaskPrompt], scores: ResponseScores
    ) -> Iterator[list[Response]]:
        """Yield batch after batch in the prompts' order, equal on all ranks; then free the policy's
        memory."""
        t = self.tokenizer
        engine = self._engine("actor", f"policies.{policy}.load")
        actor = MegatronActor(engine, eos_id=t.eos_id, pad_id=t.pad_id, decode=t.decode)
        size = self.recipe.generation.batch
        try:
            for start in range(0, len(prompts), size):
                yield self._batch(actor, policy, prompts[start : start + size], scores)
        finally:
            release(engine)

    def _batch(
        self,
        actor: MegatronActor,
        policy: str,
        prompts: Sequence[TaskPrompt],
        scores: ResponseScores,
    ) -> list[Response]:
        """Return all responses on every rank. Replica i mod size draws row i; replicas without a
        row repeat the last one, which does not count."""
        dp = self.mesh.data_parallel
        places = range(dp.rank, -(-len(prompts) // dp.size) * dp.size, dp.size)
        rows = [prompts[min(place, len(prompts) - 1)] for place in places]
        rollout = self.sampler.respond(actor, self._prompts(rows), self._sampling())
        figures = {name: values.tolist() for name, values in scores.of(actor, rollout).items()}
        tokens, finished = rollout.response_lengths.tolist(), rollout.finished.tolist()
        mine = [
            (
                place,
                Response(
                    policy=policy,
                    task=prompt.task,
                    prompt_id=prompt.prompt_id,
                    text=rollout.response_text[i],
                    tokens=tokens[i],
                    finished=finished[i],
                    figures={name: values[i] for name, values in figures.items()},
                ),
            )
            for i, (place, prompt) in enumerate(zip(places, rows, strict=True))
            if place < len(prompts)
        ]
        gathered = self.mesh.gather(mine)
        ordered = sorted((row for rows in gathered for row in rows), key=lambda row: row[0])
        return [check_finite(response) for _, response in ordered]

    def _prompts(self, rows: Sequence[TaskPrompt]) -> Prompts:
        ids = [self.ids[prompt.prompt_id] for prompt in rows]
        width = max(map(len, ids))
        noise = torch.tensor([sample_id(prompt.prompt_id) for prompt in rows])
        return Prompts(
            tokens=torch.tensor([x + [self.tokenizer.pad_id] * (width - len(x)) for x in ids]),
            lengths=torch.tensor([len(x) for x in ids]),
            prompt_id=noise,
            sample_id=noise,
            source=tuple(prompt.source for prompt in rows),
            extras=tuple({} for _ in rows),
        )

    def _sampling(self) -> Sampling:
        keys = asdict(self.recipe.generation)
        del keys["batch"]
        return Sampling(**keys)


def group_head(path: Path, where: str) -> tuple[HeadSpec, tuple[float, ...]]:
    """Return a critic's group head and its groups' ranks.

    Raises UserError for a critic without groups, or without a record of which one is high.
    """
    fix = (
        "give the checkpoint of a run with a group classifier (runs/…/final), or leave"
        " models.critic out"
    )
    unknown = "which group is the high one is not recorded"
    if weights_kind(path) != "checkpoint":
        raise UserError(f"{path} is a Hugging Face folder: {unknown}", where=where, fix=fix)
    role = read_meta(path).roles.get("critic")
    if role is None or role.group is None:
        raise UserError(f"{path} has no critic with a group head", where=where, fix=fix)
    saved = read_state(path).get("algorithm", {})
    if "groups" not in saved:
        raise UserError(f"{path}: {unknown}", where=where, fix=fix)
    tracker = GroupTracker(role.group.num_groups)
    # with given labels, the head's state is stored beside theirs
    tracker.load_state_dict(saved.get("observer", saved["groups"]))
    return role.group, tuple(tracker.ranks())


def sample_id(prompt_id: str) -> int:
    """Return 63 bits of a hash: a prompt's noise is the same in every order, batch and world."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big") >> 1


def check_finite(response: Response) -> Response:
    """Return the response. Raises UserError for a score that is NaN or infinite."""
    for name, value in response.figures.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} of {response.policy}'s response to {response.task}/{response.prompt_id} is"
                f" {value}",
                where="models",
                fix="its weights are damaged, or precision.dtype=fp32 is needed",
            )
    return response
