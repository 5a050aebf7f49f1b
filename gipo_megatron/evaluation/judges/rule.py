"""A judge that follows a rule one can compute: for tests, and to see what a bias alone would
give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, final

from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Comparison, Verdict
from gipo_megatron.recipe.registry import OneOf, register

ALWAYS = {
    "always_first": FIRST,
    "always_second": SECOND,
    "always_tie": TIE,
    "always_failed": FAILED,
}
RULES = ("longer", "shorter", *ALWAYS)


@final
@register("judge", "rule")
@dataclass
class RuleJudge:
    """`longer` and `shorter` count characters; equal lengths are a tie."""

    rule: Annotated[str, OneOf(*RULES)] = "longer"

    name = "rule"

    def judge(
        self, comparisons: Sequence[Comparison], done: Callable[[int], None]
    ) -> list[Verdict]:
        verdicts = [
            Verdict(self._choice(len(c.first), len(c.second)), self.rule) for c in comparisons
        ]
        done(len(verdicts))
        return verdicts

    def about(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def _choice(self, first: int, second: int) -> str:
        if self.rule in ALWAYS:
            return ALWAYS[self.rule]
        if first == second:
            return TIE
        return FIRST if (first > second) == (self.rule == "longer") else SECOND
