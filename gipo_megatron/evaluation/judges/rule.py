"""A judge with a computable rule: for tests, and to measure what a bias alone would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Judge, Pair, Verdict
from gipo_megatron.registry import OneOf, register

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
class RuleJudge(Judge):
    """`longer` and `shorter` count characters; equal lengths are a tie."""

    rule: Annotated[str, OneOf(*RULES)] = "longer"

    name: ClassVar[str] = "rule"

    def judge(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> list[Verdict | None]:
        done(len(pairs))
        return [Verdict(self._choice(len(p.first), len(p.second)), self.rule) for p in pairs]

    def _choice(self, first: int, second: int) -> str:
        if self.rule in ALWAYS:
            return ALWAYS[self.rule]
        if first == second:
            return TIE
        return FIRST if (first > second) == (self.rule == "longer") else SECOND
