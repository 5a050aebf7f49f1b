"""What head-to-head evaluation talks about: tasks, prompts, responses, comparisons, verdicts. Plain
values, all of them JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

KINDS = ("helpful", "harmless", "summary")  # what a task's answers are judged for
# a judge's verdict on one presentation of a pair
FIRST, SECOND, TIE, FAILED = "first", "second", "tie", "failed"
# an outcome of both presentations, seen from the subject; TIE and FAILED too
WIN, LOSE = "win", "lose"


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt of a task. `prompt_id` is a hash of (task, text): the same prompt in every run,
    whatever its place in the file."""

    task: str
    kind: str  # one of KINDS
    prompt_id: str
    text: str  # what the policy is given, template and all
    # what a judge and a reader are shown: the conversation without a template's marks
    question: str
    source: str
    reference: str = ""  # the data's own answer, where there is one (never shown to a judge)


@dataclass(frozen=True)
class Response:
    """One policy's answer to one prompt."""

    policy: str
    task: str
    prompt_id: str
    text: str
    tokens: int
    finished: bool  # ended by end-of-text, not cut at the maximal length
    # score (raw reward), kl (nats against the reference, summed), p_high
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt as a judge sees them, in this order."""

    task: str
    kind: str
    prompt_id: str
    question: str
    first: str
    second: str
    # first_score, second_score: for judges that only compare numbers
    extras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one Comparison."""

    choice: str  # FIRST | SECOND | TIE | FAILED
    said: str = ""  # the judge's words, or why it failed
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class Judge(Protocol):
    """`judge` answers in the order of its arguments, never fewer; what cannot be judged is FAILED,
    never guessed. Rank 0 only.

    done(n) is called when n more are answered (progress). `name` is shown in reports; `about` is
    what results.json keeps of it (model, prompts' fingerprint, cost), never a key or a secret.
    """

    name: str

    def judge(
        self, comparisons: Sequence[Comparison], done: Callable[[int], None]
    ) -> list[Verdict]: ...

    def about(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Duel:
    """Subject against opponent on one prompt: both presentations, and what follows from them
    (docs/evaluation.md)."""

    task: str
    opponent: str
    prompt_id: str
    source: str
    subject_first: Verdict
    opponent_first: Verdict
    subject_tokens: int
    opponent_tokens: int
    # the inferred group of the prompt, where a group classifier was given
    p_high: float | None = None

    @property
    def outcome(self) -> str:
        """WIN or LOSE only where both presentations agree; FAILED where either failed; else TIE."""
        a, b = self.subject_first.choice, self.opponent_first.choice
        if FAILED in (a, b):
            return FAILED
        if (a, b) == (FIRST, SECOND):
            return WIN
        return LOSE if (a, b) == (SECOND, FIRST) else TIE

    @property
    def flipped(self) -> bool:
        """The judge preferred a place, not an answer: first both times, or second both times."""
        return (
            self.subject_first.choice == self.opponent_first.choice
            and self.subject_first.choice in (FIRST, SECOND)
        )
