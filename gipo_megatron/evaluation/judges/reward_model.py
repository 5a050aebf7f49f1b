"""The reward model as a judge: the higher raw score wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Judge, Pair, Verdict
from gipo_megatron.registry import Range, register


@final
@register("judge", "reward_model")
@dataclass
class RewardModelJudge(Judge):
    """first - second > tie_margin: first; < -tie_margin: second; else a tie.

    A pair without two finite scores is FAILED.
    """

    needs: ClassVar[tuple[str, ...]] = ("reward",)

    # in the units of models.reward's raw scores
    tie_margin: Annotated[float, Range(0)] = 0.0

    name: ClassVar[str] = "reward_model"

    def judge(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> list[Verdict | None]:
        done(len(pairs))
        return [self._verdict(pair.extras) for pair in pairs]

    def _verdict(self, scores: dict[str, float]) -> Verdict:
        if not {"first_score", "second_score"} <= scores.keys():
            return Verdict(FAILED, "no scores: the responses were made without models.reward")
        first, second = scores["first_score"], scores["second_score"]
        text = f"{first:.6g} against {second:.6g}"
        if not (math.isfinite(first) and math.isfinite(second)):
            return Verdict(FAILED, text)
        difference = first - second
        if abs(difference) <= self.tie_margin:
            return Verdict(TIE, text)
        return Verdict(FIRST if difference > 0 else SECOND, text)
