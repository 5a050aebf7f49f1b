"""Algorithms of a plugin: the planner has not heard of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gipo_megatron.registry import from_runtime, register
from gipo_megatron.roles import Actor, Reference, RewardModel
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Loss, Prompts, Rollout, Sequences, StepResult, TokenStats


def likelihood(output: TokenStats, batch: Any) -> Loss:
    return Loss({"nll": (-output.logprobs.sum(), "token")})


def needs_text(prompt: str, response: str, extras: dict[str, Any]) -> float:
    """A reward that fails on made-up rows."""
    return float(extras["answer"])


@register("algorithm", "test_twice")
@dataclass
class Twice:
    """Two optimizer steps on the same examples."""

    data: ClassVar[str] = "sft"
    trained: ClassVar[tuple[str, ...]] = ("actor",)

    actor: Actor = from_runtime("actor")
    examples: Callable[[int], Sequences] = from_runtime("examples")

    def step(self, step: int) -> StepResult:
        batch = self.examples(step)
        for _ in range(2):
            self.actor.update((batch, likelihood))
        return StepResult({})


@register("algorithm", "test_in_turn")
@dataclass
class InTurn:
    """A rollout, then an update of the reward model and one of the actor for each minibatch."""

    data: ClassVar[str] = "prompt"
    trained: ClassVar[tuple[str, ...]] = ("reward", "actor")

    reward: RewardModel = from_runtime("reward")
    actor: Actor = from_runtime("actor")
    reference: Reference = from_runtime("reference")
    minibatch: int = from_runtime("minibatch")
    prompts: Callable[[int], Prompts] = from_runtime("prompts")

    def step(self, step: int) -> StepResult:
        rollout = self.actor.generate(self.prompts(step), Sampling(max_response=8))
        self.reference.logprobs(rollout)
        for start in range(0, len(rollout), self.minibatch):
            rows = rollout.block(start, start + self.minibatch)
            self.reward.update((rows, self.score_loss))
            self.reward.score(rows)
            self.actor.update((rows, likelihood))
        return StepResult({})

    def score_loss(self, output: Tensor, batch: Rollout) -> Loss:
        return Loss({"score": (output.sum(), "sequence")})


@register("algorithm", "test_reads_text")
@dataclass
class ReadsText:
    """Needs real rows."""

    data: ClassVar[str] = "prompt"
    trained: ClassVar[tuple[str, ...]] = ("actor",)

    actor: Actor = from_runtime("actor")
    prompts: Callable[[int], Prompts] = from_runtime("prompts")

    def step(self, step: int) -> StepResult:
        int(self.prompts(step).extras[0]["prompt"])
        return StepResult({})
