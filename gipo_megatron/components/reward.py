"""One score per response: raw, shaped for PPO, and as the return G of the groups."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel, RewardModel
from gipo_megatron.types import Rollout, Scores

COMBINE = ("mean", "min", "mean_minus_std")


class Shaping:
    """From a base score to Scores: penalties, running moments (all history, this batch included),
    clips (algorithm.md 3)."""

    def __init__(
        self,
        missing_eos_penalty: float,
        length_penalty: float,
        normalise: bool,
        clip: float,
        dp: DataParallel,
    ) -> None:
        if clip < 0:
            raise UserError(
                f"clip is {clip}", where="reward.clip", fix="a number > 0, or 0 for none"
            )
        self.missing_eos_penalty, self.length_penalty = missing_eos_penalty, length_penalty
        self.normalise, self.clip, self.dp = normalise, clip, dp
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: sum of (x - mean)^2

    def penalised(self, base: Tensor, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """(raw [B], what was taken off by name)."""
        parts: dict[str, Tensor] = {}
        if self.missing_eos_penalty:
            parts["missing_eos"] = -self.missing_eos_penalty * (~rollout.finished).to(base.dtype)
        if self.length_penalty:
            parts["length"] = -self.length_penalty * rollout.response_lengths.to(base.dtype)
        return base + sum(parts.values()), parts

    def scores(self, raw: Tensor, parts: dict[str, Tensor]) -> Scores:
        """Advances the moments. Rows that are not finite stay so, and count nowhere."""
        batch_mean = self._advance(raw.double())
        std = self.std
        scaled = (
            (raw.double() - self.mean) / std
            if std >= ops.MIN_STD
            else torch.zeros_like(raw, dtype=torch.float64)
        )
        shaped = scaled if self.normalise else raw.double()
        if self.clip > 0:
            shaped = shaped.clamp(-self.clip, self.clip)
        returns = ops.score_returns(raw.double(), batch_mean, std)
        return Scores(
            raw=raw,
            shaped=shaped.to(raw.dtype),
            returns=returns.to(raw.dtype),
            parts=parts,
            std=std,
        )

    @property
    def std(self) -> float:
        """Population standard deviation over all history; 0 before the first score."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def _advance(self, raw: Tensor) -> float:
        """Merge the global batch into the moments (Chan et al. 1979); returns the batch's mean."""
        kept = raw[torch.isfinite(raw)]
        count, total = self.dp.sum(torch.stack([torch.ones_like(kept).sum(), kept.sum()])).tolist()
        if not count:
            return 0.0
        mean = total / count
        squares = float(self.dp.sum((kept - mean).square().sum().reshape(1))[0])
        delta, merged = mean - self.mean, self.count + count
        self.squares += squares + delta**2 * self.count * count / merged
        self.mean += delta * count / merged
        self.count = merged
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


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
class ModelReward:
    """raw = reward model's score - penalties."""

    needs: ClassVar[tuple[str, ...]] = ("reward",)

    # taken off a response that was cut at its maximal length, raw score units
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0  # taken off per response token, raw score units
    normalise: bool = True  # PPO's reward = (raw - mean) / std over all history
    clip: float = 0.8  # PPO's reward is cut to +- this; 0: never

    reward_models: dict[str, RewardModel] = from_runtime("reward_models")
    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        self._reward_model = _model(self.reward_models, "reward", "reward.name")
        self._shaping = Shaping(
            self.missing_eos_penalty, self.length_penalty, self.normalise, self.clip, self.dp
        )

    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """(raw scores [B], their parts); changes nothing, so evaluation may call it."""
        return self._shaping.penalised(self._reward_model.score(rollout), rollout)

    def score(self, rollout: Rollout) -> Scores:
        return self._shaping.scores(*self.raw(rollout))

    def state_dict(self) -> dict[str, Any]:
        return self._shaping.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shaping.load_state_dict(state)


@final
@register("reward", "function")
@dataclass
class FunctionReward:
    """raw = f(prompt, response, extras) - penalties; f is any importable Python function that
    returns a number."""

    function: str = ""  # module:function
    # taken off a response that was cut at its maximal length, raw score units
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0  # taken off per response token, raw score units
    normalise: bool = True  # PPO's reward = (raw - mean) / std over all history
    clip: float = 0.8  # PPO's reward is cut to +- this; 0: never

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        self._function = _import_function(self.function)
        self._shaping = Shaping(
            self.missing_eos_penalty, self.length_penalty, self.normalise, self.clip, self.dp
        )

    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """(raw scores [B], their parts); changes nothing, so evaluation may call it."""
        rows = zip(rollout.response_text, rollout.extras, strict=True)
        values = [
            float(self._function(extras["prompt"], response, extras)) for response, extras in rows
        ]
        return self._shaping.penalised(
            torch.tensor(values, dtype=torch.float32, device=rollout.tokens.device), rollout
        )

    def score(self, rollout: Rollout) -> Scores:
        return self._shaping.scores(*self.raw(rollout))

    def state_dict(self) -> dict[str, Any]:
        return self._shaping.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shaping.load_state_dict(state)


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
class EnsembleReward:
    """raw = several reward models combined - penalties: mean, min, or mean - k std over the members
    (Coste et al. 2024)."""

    # keys of the recipe's models block: [reward_a, reward_b]
    members: list[str] = field(default_factory=list)
    combine: str = "mean"  # mean | min | mean_minus_std
    k: float = 1.0  # of mean_minus_std
    # taken off a response that was cut at its maximal length, raw score units
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0  # taken off per response token, raw score units
    normalise: bool = True  # PPO's reward = (raw - mean) / std over all history
    clip: float = 0.8  # PPO's reward is cut to +- this; 0: never

    reward_models: dict[str, RewardModel] = from_runtime("reward_models", roles_key="members")
    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise UserError(
                f"combine is {self.combine!r}",
                where="reward.combine",
                fix=f"one of {', '.join(COMBINE)}",
            )
        if len(set(self.members)) < 2:
            raise UserError(
                f"an ensemble of {', '.join(self.members) or 'nobody'}",
                where="reward.members",
                fix="two different reward models or more",
            )
        self._models = {
            name: _model(self.reward_models, name, "reward.members") for name in self.members
        }
        self._shaping = Shaping(
            self.missing_eos_penalty, self.length_penalty, self.normalise, self.clip, self.dp
        )

    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """(raw scores [B], their parts); changes nothing, so evaluation may call it."""
        members = {name: model.score(rollout) for name, model in self._models.items()}
        stacked = torch.stack(list(members.values()))
        spread = stacked.std(0, correction=0)
        if self.combine == "min":
            base = stacked.min(0).values
        else:
            base = stacked.mean(0) - (self.k * spread if self.combine == "mean_minus_std" else 0.0)
        raw, penalties = self._shaping.penalised(base, rollout)
        return raw, {**members, "disagreement": spread, **penalties}

    def score(self, rollout: Rollout) -> Scores:
        return self._shaping.scores(*self.raw(rollout))

    def state_dict(self) -> dict[str, Any]:
        return self._shaping.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shaping.load_state_dict(state)
