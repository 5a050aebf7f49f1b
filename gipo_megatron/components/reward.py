"""Rewards: one score per response, raw, shaped for PPO, and standardised for the groups."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import DataParallel, RewardModel
from gipo_megatron.types import Rollout, Scores


@dataclass(kw_only=True)
class Reward(ABC):
    """Base of all rewards: penalties, running moments over all history, clips (algorithm.md 3). A
    subclass adds its keys and `base`."""

    # subtracted from a response that was cut at its maximal length, raw score units
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0  # subtracted per response token, raw score units
    normalise: bool = True  # PPO's reward = (raw - mean) / std over all history
    clip: Annotated[float, Range(0)] = 0.8  # PPO's reward is cut to +- this; 0: never

    dp: DataParallel = from_runtime("dp")

    _count: float = field(default=0.0, init=False)
    _mean: float = field(default=0.0, init=False)
    _squares: float = field(default=0.0, init=False)  # sum of (x - mean)^2

    @abstractmethod
    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores without penalties [B], and named pieces of them to log ([B] each). Changes
        nothing."""

    @final
    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Return raw scores [B], penalties included, and their parts. Changes nothing, so that
        evaluation may call it."""
        base, parts = self.base(rollout)
        penalties: dict[str, Tensor] = {}
        if self.missing_eos_penalty:
            cut = (~rollout.finished).to(base.dtype)
            penalties["missing_eos"] = -self.missing_eos_penalty * cut
        if self.length_penalty:
            penalties["length"] = -self.length_penalty * rollout.response_lengths.to(base.dtype)
        return base + sum(penalties.values()), {**parts, **penalties}

    @final
    def score(self, rollout: Rollout) -> Scores:
        """Return scores in three forms, and advance the moments. Rows that are not finite stay so,
        and count nowhere."""
        return self.scores(*self.raw(rollout))

    @final
    def scores(self, raw: Tensor, parts: dict[str, Tensor]) -> Scores:
        batch_mean = self._advance(raw.double())
        std = self.std
        scaled = (
            (raw.double() - self._mean) / std
            if std >= ops.MIN_STD
            else torch.zeros_like(raw, dtype=torch.float64)
        )
        shaped = scaled if self.normalise else raw.double()
        if self.clip > 0:
            shaped = shaped.clamp(-self.clip, self.clip)
        standardised = ops.standardised_scores(raw.double(), batch_mean, std)
        return Scores(
            raw=raw,
            shaped=shaped.to(raw.dtype),
            standardised_scores=standardised.to(raw.dtype),
            parts=parts,
            std=std,
        )

    @property
    def std(self) -> float:
        """Population standard deviation over all history; 0 before the first score."""
        return math.sqrt(self._squares / self._count) if self._count else 0.0

    def _advance(self, raw: Tensor) -> float:
        """Merge the global batch into the moments (Chan et al. 1979); return the batch's mean."""
        kept = raw[torch.isfinite(raw)]
        count, total = self.dp.sum(torch.stack([torch.ones_like(kept).sum(), kept.sum()])).tolist()
        if not count:
            return 0.0
        mean = total / count
        squares = float(self.dp.sum((kept - mean).square().sum().reshape(1))[0])
        delta, merged = mean - self._mean, self._count + count
        self._squares += squares + delta**2 * self._count * count / merged
        self._mean += delta * count / merged
        self._count = merged
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]


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
class ModelReward(Reward):
    """raw = reward model's score - penalties."""

    needs: ClassVar[tuple[str, ...]] = ("reward",)

    reward_models: dict[str, RewardModel] = from_runtime("reward_models")

    def __post_init__(self) -> None:
        self._reward_model = _model(self.reward_models, "reward", "reward.name")

    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return self._reward_model.score(rollout), {}


@final
@register("reward", "function")
@dataclass
class FunctionReward(Reward):
    """raw = f(prompt, response, extras) - penalties; f is any importable Python function that
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
        function = getattr(importlib.import_module(module), name)
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
class EnsembleReward(Reward):
    """raw = several reward models combined - penalties: mean, min, or mean - k std over the members
    (Coste et al. 2024)."""

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
        self._models = {
            name: _model(self.reward_models, name, "reward.members") for name in self.members
        }

    def base(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        members = {name: model.score(rollout) for name, model in self._models.items()}
        stacked = torch.stack(list(members.values()))
        spread = stacked.std(0, correction=0)
        if self.combine == "min":
            combined = stacked.min(0).values
        else:
            penalty = self.k * spread if self.combine == "mean_minus_std" else 0.0
            combined = stacked.mean(0) - penalty
        return combined, {**members, "disagreement": spread}
