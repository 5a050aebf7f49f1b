"""Samplers: how responses are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import Actor
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts, Rollout


@final
@register("rollout", "sampling")
@dataclass
class SamplingRollout:
    """Sample responses from the actor itself. Keep top_k 0 and top_p 1: log-probabilities are those
    of the whole softmax (algorithm.md 5.7)."""

    # of sampling and of every log-probability of this run; above 0: greedy rollouts have no
    # gradient
    temperature: Annotated[float, Range(0, open=True)] = 1.0
    top_k: Annotated[int, Range(0)] = 0  # draw among the k likeliest tokens; 0: off
    # draw from the smallest set of tokens that holds this probability
    top_p: Annotated[float, Range(0, 1, open=True)] = 1.0
    # tokens of a response, end-of-text included; 0: the data's max_response
    max_response: Annotated[int, Range(0)] = 0

    data_max_response: int = from_runtime("max_response")
    seed: int = from_runtime("seed")

    def sample(self, actor: Actor, prompts: Prompts, step: int) -> Rollout:
        """Return one response a row; noise is a pure function of (seed, step, sample_id,
        position)."""
        sampling = Sampling(
            max_response=self.max_response or self.data_max_response,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            step=step,
        )
        return actor.generate(prompts, sampling)
