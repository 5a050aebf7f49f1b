"""The reward model as a judge: the higher raw score wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, final

from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Comparison, Verdict
from gipo_megatron.recipe.registry import Range, register


@final
@register("judge", "reward_model")
@dataclass
class RewardModelJudge:
    """first - second > tie_margin: first; < -tie_margin: second; else a tie. Without two finite
    scores a comparison is FAILED."""

    needs: ClassVar[tuple[str, ...]] = ("reward",)

    # in raw score units, what scores of models.reward are in
    tie_margin: Annotated[float, Range(0)] = 0.0

    name = "reward_model"

    def judge(
        self, comparisons: Sequence[Comparison], done: Callable[[int], None]
    ) -> list[Verdict]:
        verdicts = [self._verdict(comparison.extras) for comparison in comparisons]
        done(len(verdicts))
        return verdicts

    def about(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def _verdict(self, scores: dict[str, float]) -> Verdict:
        if not {"first_score", "second_score"} <= scores.keys():
            return Verdict(FAILED, "no scores: the responses were made without models.reward")
        first, second = scores["first_score"], scores["second_score"]
        said = f"{first:.6g} against {second:.6g}"
        if not (math.isfinite(first) and math.isfinite(second)):
            return Verdict(FAILED, said)
        difference = first - second
        if abs(difference) <= self.tie_margin:
            return Verdict(TIE, said)
        return Verdict(FIRST if difference > 0 else SECOND, said)
