"""Rewards: one score per response, raw, shaped for PPO, and standardised for the groups."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, final

from gipo_megatron import ops
from gipo_megatron.components.moments import Moments, batch_moments
from gipo_megatron.errors import UserError
from gipo_megatron.registry import OneOf, Range, from_runtime, register, user_module
from gipo_megatron.roles import DataParallel, RewardModel, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Rollout, Rows, Scores, Sequences


@dataclass(kw_only=True)
class Reward(ABC):
    """Base of all rewards: penalties, running moments over all history, clips (algorithm.md 3). A
    subclass adds its keys and `base`."""

    # subtracted from PPO's reward of a response that was cut at its maximal length, in running
    # standard deviations of the raw score; no part of the raw score and so of the groups
    missing_eos_penalty: float = 1.0
    length_penalty: float = 0.0  # subtracted per response token, raw score units
    normalise: bool = True  # PPO's reward = (raw - mean) / std over all history
    clip: Annotated[float, Range(0)] = 5.0  # PPO's reward is cut to +- this; 0: never

    dp: DataParallel = from_runtime("dp")

    _moments: Moments = field(default=Moments(), init=False)

    @abstractmethod
    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores without penalties [B], and named pieces of them to log ([B] each)."""

    def level(self, rollout: Rollout) -> Tensor | None:
        """Return what to subtract from each score so that prompts can be compared [B], or None."""
        return None

    @final
    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return raw scores [B], length penalty included, and their parts. It advances no moments,
        so that evaluation may call it."""
        base, parts = self.base(rollout)
        if not self.length_penalty:
            return base, parts
        penalty = -self.length_penalty * rollout.response_lengths.to(base.dtype)
        return base + penalty, {**parts, "length": penalty}

    @final
    def score(self, rollout: Rollout) -> Scores:
        """Return scores in three forms, and advance the moments. Rows that are not finite stay so,
        and count nowhere."""
        raw, parts = self.raw(rollout)
        level = self.level(rollout)
        if level is not None:
            raw, parts = raw - level, {**parts, "anchor": level}
        return self.scores(raw, parts, ~rollout.finished)

    @final
    def scores(self, raw: Tensor, parts: dict[str, Tensor], cut: Tensor) -> Scores:
        """Return the scores of raw [B]; `cut`, bool [B]: responses without end-of-text."""
        batch = batch_moments(raw, self.dp)
        self._moments = self._moments.merged(batch)
        std = self._moments.std
        shaped = self._moments.standardise(raw) if self.normalise else raw.double()
        if self.clip > 0:
            shaped = shaped.clamp(-self.clip, self.clip)
        if self.missing_eos_penalty:
            penalty = -self.missing_eos_penalty * cut.to(raw.dtype)
            parts = {**parts, "missing_eos": penalty}
            shaped = shaped + (penalty if self.normalise else std * penalty)
        standardised = ops.standardised_scores(raw.double(), batch.mean, std)
        return Scores(
            raw=raw,
            shaped=shaped.to(raw.dtype),
            standardised_scores=standardised.to(raw.dtype),
            parts=parts,
            std=std,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"moments": asdict(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = Moments(**state["moments"])


@dataclass(kw_only=True)
class LearnedReward(Reward):
    """Base of rewards by reward models. A Bradley-Terry model may add any f(x) to all scores of a
    prompt; `anchor` takes it out, before moments, groups and clip (algorithm.md 3)."""

    # none | chosen: subtract the score of the data's chosen response to the prompt
    anchor: Annotated[str, OneOf("none", "chosen")] = "none"

    # prompt ids [b] -> the prompts with their chosen responses
    chosen: Callable[[Tensor], Sequences] | None = from_runtime("chosen")

    # prompt id -> score of its chosen response, the same on every replica
    _anchors: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.anchor == "chosen" and self.chosen is None:
            raise UserError(
                "these data have no chosen responses",
                where="reward.anchor",
                fix="read preference or SFT data, or use anchor: none",
            )

    @abstractmethod
    def score_rows(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores [B] and their parts."""

    @final
    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return self.score_rows(rollout)

    @final
    def level(self, rollout: Rollout) -> Tensor | None:
        """Return the chosen responses' scores; each prompt's is computed once."""
        if self.anchor == "none":
            return None
        ids = rollout.prompt_id.tolist()
        new = rollout.prompt_id.new_tensor(float(any(i not in self._anchors for i in ids)))
        if float(self.dp.sum(new)):  # all replicas score together
            assert self.chosen is not None
            scores, _ = self.score_rows(self.chosen(rollout.prompt_id))
            everyone = gather_rows(rollout.prompt_id, self.dp), gather_rows(scores, self.dp)
            pairs = zip(*(x.tolist() for x in everyone), strict=True)
            self._anchors |= {int(i): score for i, score in pairs if math.isfinite(score)}
        known = [self._anchors.get(i, math.nan) for i in ids]
        return torch.tensor(known, device=rollout.tokens.device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "anchors": dict(self._anchors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._anchors = dict(state["anchors"])


def _model(reward_models: dict[str, RewardModel], name: str, where: str) -> RewardModel:
    if name not in reward_models:
        raise UserError(
            f"there is no reward model {name!r}; there is"
            f" {', '.join(sorted(reward_models)) or 'none'}",
            where=where,
            fix=f"add models.{name}.load to the recipe",
        )
    return reward_models[name]


@final
@register("reward", "model")
@dataclass
class ModelReward(LearnedReward):
    """raw = reward model's score - length penalty."""

    needs: ClassVar[tuple[str, ...]] = ("reward",)

    reward_models: dict[str, RewardModel] = from_runtime("reward_models")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reward_model = _model(self.reward_models, "reward", "reward.name")

    def score_rows(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return self._reward_model.score(rows), {}


@final
@register("reward", "function")
@dataclass
class FunctionReward(Reward):
    """raw = f(prompt, response, extras) - length penalty; f is any importable Python function that
    returns a number."""

    function: str = ""  # module:function

    def problems(self) -> Iterator[UserError]:
        try:
            _import_function(self.function)
        except UserError as error:
            yield error

    def __post_init__(self) -> None:
        self._function = _import_function(self.function)

    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        rows = zip(rollout.response_text, rollout.extras, strict=True)
        values = [
            float(self._function(extras["prompt"], response, extras)) for response, extras in rows
        ]
        return torch.tensor(values, dtype=torch.float32, device=rollout.tokens.device), {}


def _import_function(path: str) -> Callable[[str, str, dict[str, Any]], float]:
    module, separator, name = path.partition(":")
    where, fix = (
        "reward.function",
        "write my_module:my_function; it takes (prompt, response, extras) and returns a number",
    )
    if not (module and separator and name):
        raise UserError(f"{path!r} names no function", where=where, fix=fix)
    try:
        function = getattr(user_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {path!r}: {error}", where=where, fix=fix) from error
    if not callable(function):
        raise UserError(
            f"{path!r} is a {type(function).__name__}, not a function", where=where, fix=fix
        )
    return function


@final
@register("reward", "ensemble")
@dataclass
class EnsembleReward(LearnedReward):
    """raw = several reward models combined - length penalty: mean, min, or mean - k std over the
    members (Coste et al. 2024).

    Members have scales and offsets of their own. Each is standardised by its mean and std on the
    first batch that is scored, which then stay: raw is one function for the whole run.
    """

    # keys of the recipe's models block: [reward_a, reward_b]
    members: list[str] = field(default_factory=list)
    combine: Annotated[str, OneOf("mean", "min", "mean_minus_std")] = "mean"
    k: float = 1.0  # of mean_minus_std

    reward_models: dict[str, RewardModel] = from_runtime("reward_models", roles_key="members")

    def problems(self) -> Iterator[UserError]:
        if len(set(self.members)) < 2:
            yield UserError(
                f"an ensemble of {', '.join(self.members) or 'no models'}",
                where="reward.members",
                fix="two different reward models or more",
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._models = {
            name: _model(self.reward_models, name, "reward.members") for name in self.members
        }
        self._scales: dict[str, Moments] = {}

    def score_rows(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        members = {name: model.score(rows) for name, model in self._models.items()}
        if not self._scales:
            self._scales = {name: batch_moments(x, self.dp) for name, x in members.items()}
        stacked = torch.stack(
            [self._scales[name].standardise(x).to(x.dtype) for name, x in members.items()]
        )
        spread = stacked.std(0, correction=0)
        if self.combine == "min":
            combined = stacked.min(0).values
        else:
            penalty = self.k * spread if self.combine == "mean_minus_std" else 0.0
            combined = stacked.mean(0) - penalty
        return combined, {**members, "disagreement": spread}

    def state_dict(self) -> dict[str, Any]:
        scales = {name: asdict(moments) for name, moments in self._scales.items()}
        return {**super().state_dict(), "scales": scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._scales = {name: Moments(**moments) for name, moments in state["scales"].items()}
