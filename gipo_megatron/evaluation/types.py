"""Plain values of head-to-head evaluation: tasks' prompts, responses, pairs, verdicts, comparisons.

One model is compared with one or several baselines. All values can be written as JSON.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

KINDS = ("helpful", "harmless", "summary")  # criteria by which a task's responses are judged
# verdict on a pair
FIRST, SECOND, TIE, FAILED = "first", "second", "tie", "failed"
# outcome of a comparison for the model; also TIE and FAILED
WIN, LOSE = "win", "lose"
# names in results.json that no task may have
RESERVED = ("subject", "judge", "bootstrap", "incomplete", "warnings", "policies")


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt of a task. `prompt_id` is a hash of (task, text), for any order of the file."""

    task: str
    kind: str  # one of KINDS
    prompt_id: str
    text: str  # the policy's input, template included
    question: str  # the conversation without template tokens, for judges and readers
    source: str
    reference: str = ""  # the data set's own response, if any (never shown to a judge)


@dataclass(frozen=True)
class Response:
    """One policy's response to one prompt."""

    policy: str
    task: str
    prompt_id: str
    text: str
    tokens: int
    finished: bool  # ended by end-of-text, not cut at the maximal length
    # score (raw reward), kl (nats against the reference, summed), p_high
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadToHead:
    """A model, the baselines it is compared with, and all policies' responses to all prompts."""

    model: str
    baselines: Sequence[str]
    prompts: Sequence[TaskPrompt]
    responses: Mapping[str, Sequence[Response]]  # by policy

    @property
    def by_prompt(self) -> dict[tuple[str, str, str], Response]:
        """Return {(policy, task, prompt_id): response}."""
        return {
            (name, r.task, r.prompt_id): r for name, rows in self.responses.items() for r in rows
        }


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt in the order in which a judge sees them."""

    task: str
    kind: str
    prompt_id: str
    question: str
    first: str
    second: str
    # first_score, second_score: for judges that compare scores
    extras: dict[str, float] = field(default_factory=dict)


class PairOrder(NamedTuple):
    """Key of a verdict: which prompt, which baseline, and whether the model's response is first."""

    task: str
    baseline: str
    prompt_id: str
    model_first: bool


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one Pair."""

    choice: str  # FIRST | SECOND | TIE | FAILED
    text: str = ""  # the judge's explanation, or the reason of a failure
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass
class Judge(ABC):
    """A component of the slot `judge`, built and called on rank 0 only."""

    name: ClassVar[str]  # as in the recipe and in reports
    needs: ClassVar[tuple[str, ...]] = ()  # recipe keys in `models` that must be set
    transport: ClassVar[tuple[str, ...]] = ()  # recipe keys that cannot change a verdict
    # Ratings of a sample of the prompts are read from files: verdicts are not stored, and prompts
    # without a verdict are left out.
    sampled: ClassVar[bool] = False

    def check_ready(self) -> None:  # noqa: B027  most judges need nothing
        """Raise UserError for what is missing (an API key) before hours of generation."""

    def prepare(self, pairs: Sequence[Pair]) -> bool:
        """Return whether verdicts can be given now. `pairs`: all of them, the model's first."""
        return True

    @abstractmethod
    def judge(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> list[Verdict | None]:
        """Return a verdict per pair, in order; FAILED if it cannot be judged, None if not sampled.

        `done(n)` is called after every n further verdicts, to show progress.
        """

    def about(self) -> dict[str, Any]:
        """Return what results.json records: settings, prompt fingerprint, tokens; no secret."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Comparison:
    """The model against one baseline on one prompt: the verdicts on both orders of the pair."""

    task: str
    baseline: str
    prompt_id: str
    source: str
    model_first: Verdict
    baseline_first: Verdict
    model_tokens: int
    baseline_tokens: int
    p_high: float | None = None  # inferred group of the prompt, with a group classifier

    @property
    def outcome(self) -> str:
        """WIN or LOSE if both verdicts prefer the same response; FAILED if one failed; else TIE."""
        a, b = self.model_first.choice, self.baseline_first.choice
        if FAILED in (a, b):
            return FAILED
        if (a, b) == (FIRST, SECOND):
            return WIN
        return LOSE if (a, b) == (SECOND, FIRST) else TIE

    @property
    def flipped(self) -> bool:
        """Return whether the judge preferred a position: first twice, or second twice."""
        a, b = self.model_first.choice, self.baseline_first.choice
        return a == b and a in (FIRST, SECOND)
