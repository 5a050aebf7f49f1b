"""Policies answer prompts on Megatron, one policy at a time, with what is measured beside them:
score, KL, inferred group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.components.tracker import GroupTracker
from gipo_megatron.conversion.verify import release
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe
from gipo_megatron.evaluation.types import Response, TaskPrompt
from gipo_megatron.files import write_json
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.types import Prompts, Rollout
from gipo_megatron.weights.checkpoints import read_meta, weights_kind
from gipo_megatron.weights.sources import (
    check_tokenizer,
    find_tokenizer,
    locate,
    stored_fingerprint,
    tokenizer_difference,
)

# --------------------------------------------------------------------------- weights and tokenizers


def find_weights(recipe: EvaluationRecipe) -> dict[str, Path]:
    """{recipe key: folder} of every model, each one readable. Raises UserError for what is no
    model, or is damaged."""
    found = {}
    for section, group in (("policies", recipe.policies), ("models", recipe.models)):
        for name, weights in group.items():
            key = f"{section}.{name}.load"
            found[key] = locate(weights.load, key)
            if weights_kind(found[key]) == "checkpoint":
                read_meta(found[key])  # every file is there, at its size
    return found


def shared_tokenizer(
    recipe: EvaluationRecipe, weights: Mapping[str, Path]
) -> tuple[Tokenizer, list[str]]:
    """The one tokenizer of all models, and what to warn of.

    Raises UserError naming both where two policies were made with different ones: the same ids
    would mean different text.
    """
    keys = [f"policies.{name}.load" for name in recipe.policies]
    tokenizer = find_tokenizer(recipe.model.tokenizer, {keys[0]: str(weights[keys[0]])})
    first = next(
        (
            (key, said)
            for key in keys
            if (said := stored_fingerprint(weights[key], tokenizer)) is not None
        ),
        None,
    )
    for key in keys:
        said = stored_fingerprint(weights[key], tokenizer)
        if first is not None and said not in (None, first[1]):
            raise UserError(
                f"two policies with different tokenizers: {first[0].split('.')[1]}"
                f" ({weights[first[0]]}) and {key.split('.')[1]} ({weights[key]})"
                + tokenizer_difference(weights[first[0]], weights[key]),
                where=key,
                fix=(
                    "evaluate policies of one tokenizer together, the others in an evaluation of"
                    " their own"
                ),
            )
    notes: list[str] = []
    for key, folder in weights.items():
        for template in dict.fromkeys(task.template for task in recipe.tasks):
            notes += check_tokenizer(folder, tokenizer, template, key)
    return tokenizer, notes


# ------------------------------------------------------------------------ where responses come from


def origin(
    recipe: EvaluationRecipe, weights: Mapping[str, Path], tokenizer: Tokenizer
) -> dict[str, str]:
    """What a stored response depends on besides its prompt, in one line each; weights by their
    files' sizes and times."""
    generation = {key: value for key, value in asdict(recipe.generation).items() if key != "batch"}
    said = {f"generation.{key}": str(value) for key, value in generation.items()}
    return {
        **said,
        "model.tokenizer": tokenizer.fingerprint,
        **{key: _state_of(folder) for key, folder in weights.items()},
    }


def _state_of(folder: Path) -> str:
    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    facts = [
        (str(p.relative_to(folder.resolve())), p.stat().st_size, p.stat().st_mtime_ns)
        for p in files
    ]
    return f"{folder} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def check_origin(directory: Path, mine: Mapping[str, str]) -> None:
    """Remembers where this folder's responses come from; UserError when those that are there came
    from elsewhere. Rank 0 only.

    Policies may come and go; everything else stays as it was for the first response.
    """
    file = directory / "origin.json"
    before: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not (directory / "verdicts.jsonl").is_file() and not any(
        (directory / "responses").glob("*.jsonl")
    ):
        before = {}  # stopped before the first response
    keys = [
        key
        for key in dict.fromkeys((*before, *mine))
        if not key.startswith("policies.") or (key in before and key in mine)
    ]
    changed = [key for key in keys if before and before.get(key) != mine.get(key)]
    if changed:
        lines = "; ".join(
            f"{key}: {before.get(key, 'none')} there, {mine.get(key, 'none')} now"
            for key in changed
        )
        fix = "choose another run.dir, or remove this one to draw everything again"
        raise UserError(
            f"{directory} holds responses that were made otherwise: {lines}",
            where="run.dir",
            fix=fix,
        )
    write_json(file, {**before, **mine})


# ------------------------------------------------------------------------------ beside the policies


@dataclass
class Measures:
    """What is measured of a response when it is drawn; each where the recipe names its model."""

    reward: MegatronRewardModel | None = None
    reference: MegatronReference | None = None
    critic: MegatronCritic | None = None
    ranks: tuple[float, ...] = ()  # of the critic's groups, 1 for the high one

    def of(self, actor: MegatronActor, rollout: Rollout) -> dict[str, Tensor]:
        """[B] each: score (raw), kl (sum over response tokens of log π - log π_ref, nats),
        p_high."""
        values = {}
        if self.reward is not None:
            values["score"] = self.reward.score(rollout)
        if self.reference is not None:
            difference = (
                actor.logprobs(rollout).logprobs - self.reference.logprobs(rollout).logprobs
            )
            values["kl"] = ops.sequence_sum(difference, rollout.mask)
        if self.critic is not None:
            logits = self.critic.evaluate(rollout).group_logits
            assert logits is not None
            values["p_high"] = (logits.softmax(-1) * logits.new_tensor(self.ranks)).sum(1)
        return values


def _group_head(path: Path) -> tuple[HeadSpec, tuple[float, ...]]:
    """A critic's head and its groups' ranks. UserError for a critic that does not tell groups
    apart, or not which one is high."""
    fix = (
        "give the checkpoint of a run with a group classifier (runs/…/final), or leave"
        " models.critic out"
    )
    where = "models.critic.load"
    if weights_kind(path) != "checkpoint":
        raise UserError(
            f"{path} is a Hugging Face folder: it does not say which group is the high one",
            where=where,
            fix=fix,
        )
    critic = read_meta(path).roles.get("critic")
    if critic is None or critic.group is None:
        raise UserError(f"{path} has no critic with a group head", where=where, fix=fix)
    state = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    saved = state.get("algorithm", {})
    if "groups" not in saved:
        raise UserError(f"{path} does not say which group is the high one", where=where, fix=fix)
    tracker = GroupTracker(critic.group.num_groups)
    # with given labels, the head is the one beside them
    tracker.load_state_dict(saved.get("observer", saved["groups"]))
    return critic.group, tuple(tracker.ranks())


# ------------------------------------------------------------------------------------------ answers


@dataclass
class Answering:
    """Policies of one recipe on one mesh. Every method is collective."""

    recipe: EvaluationRecipe
    mesh: Mesh
    tokenizer: Tokenizer
    weights: Mapping[str, Path]  # recipe key -> folder
    ids: Mapping[str, list[int]]  # the tokens of each prompt_id
    head: HeadSpec | None = field(default=None, init=False)  # of models.critic
    ranks: tuple[float, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if "critic" in self.recipe.models:
            self.head, self.ranks = _group_head(self.weights["models.critic.load"])

    def _engine(self, role: str, key: str, group: HeadSpec | None = None) -> Engine:
        recipe = self.recipe
        return build_engine(
            role,
            self.mesh,
            recipe.model.architecture,
            recipe.precision,
            micro_batch=recipe.batch.micro_batch,
            load=str(self.weights[key]),
            group=group,
        )

    def measures(self) -> Measures:
        """Loads the models that the recipe names; they stay while the policies come and go."""
        named, measures = self.recipe.models, Measures()
        if "reward" in named:
            measures.reward = MegatronRewardModel(self._engine("reward", "models.reward.load"))
        if "reference" in named:
            measures.reference = MegatronReference(
                self._engine("reference", "models.reference.load")
            )
        if "critic" in named:
            engine = self._engine("critic", "models.critic.load", self.head)
            measures.critic = MegatronCritic(engine)
            measures.ranks = self.ranks
        return measures

    def answers(
        self, policy: str, prompts: Sequence[TaskPrompt], measures: Measures
    ) -> Iterator[list[Response]]:
        """One batch after the other, in the prompts' order, the same on every rank; the policy's
        memory is free at the end."""
        t = self.tokenizer
        actor = MegatronActor(
            self._engine("actor", f"policies.{policy}.load"),
            eos_id=t.eos_id,
            pad_id=t.pad_id,
            decode=t.decode,
        )
        size = self.recipe.generation.batch
        try:
            for start in range(0, len(prompts), size):
                yield self._batch(actor, policy, prompts[start : start + size], measures)
        finally:
            release(actor.engine)

    def _batch(
        self, actor: MegatronActor, policy: str, prompts: Sequence[TaskPrompt], measures: Measures
    ) -> list[Response]:
        """Row i is answered by replica i mod size; replicas without a row of their own repeat the
        last one, which does not count."""
        dp = self.mesh.data_parallel
        places = range(dp.rank, -(-len(prompts) // dp.size) * dp.size, dp.size)
        rows = [prompts[min(place, len(prompts) - 1)] for place in places]
        rollout = actor.generate(self._prompts(rows), self._sampling())
        figures = {name: values.tolist() for name, values in measures.of(actor, rollout).items()}
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
        everyone: list[Any] = [mine]
        if dp.size > 1:
            everyone = [None] * dp.size
            dist.all_gather_object(everyone, mine, group=dp.group)
        ordered = sorted((row for rows in everyone for row in rows), key=lambda row: row[0])
        return [_finite(response) for _, response in ordered]

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
        drawn = self.recipe.generation
        return Sampling(
            max_response=drawn.max_response,
            temperature=drawn.temperature,
            top_k=drawn.top_k,
            top_p=drawn.top_p,
            repetition_penalty=drawn.repetition_penalty,
            seed=drawn.seed,
        )


def sample_id(prompt_id: str) -> int:
    """63 bits of a prompt's identity: its noise is the same in every order, batch and world."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big") >> 1


def _finite(response: Response) -> Response:
    for name, value in response.figures.items():
        if not torch.isfinite(torch.tensor(value)):
            what = (
                f"{name} of {response.policy}'s response to {response.task}/{response.prompt_id} is"
                f" {value}"
            )
            raise UserError(
                what,
                where="models",
                fix="its weights are damaged, or precision.dtype=fp32 is needed",
            )
    return response
