"""How responses are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import Actor
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts, Rollout


@final
@register("rollout", "sampling")
@dataclass
class SamplingRollout:
    """The actor samples its own responses. Keep top_k 0 and top_p 1: log-probabilities are of the
    whole softmax (algorithm.md 5.7)."""

    temperature: float = 1.0  # of sampling and of every log-probability of this run
    top_k: int = 0  # draw among the k likeliest tokens; 0: off
    top_p: float = 1.0  # draw from the smallest set of tokens that holds this probability
    max_response: int = 0  # tokens of a response, end-of-text included; 0: the data's max_response

    data_max_response: int = from_runtime("max_response")
    seed: int = from_runtime("seed")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}: a greedy rollout has no gradient",
                where="rollout.temperature",
                fix="a number > 0",
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_response < 0:
            raise UserError(
                f"top_p {self.top_p}, top_k {self.top_k}, max_response {self.max_response}",
                where="rollout",
                fix="0 < top_p <= 1, top_k >= 0, max_response >= 0",
            )

    def sample(self, actor: Actor, prompts: Prompts, step: int) -> Rollout:
        """One response a row; noise is a pure function of (seed, step, sample_id, position)."""
        sampling = Sampling(
            max_response=self.max_response or self.data_max_response,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            step=step,
        )
        return actor.generate(prompts, sampling)
