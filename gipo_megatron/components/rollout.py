"""Samplers: how responses are drawn, and what their log-probabilities correct."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, final

from gipo_megatron.components.protocols import RolloutServer
from gipo_megatron.errors import UserError
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import Actor
from gipo_megatron.specs import Positive, Sampling, Serve
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Prompts, Rollout
from gipo_megatron.web import address_problem

# an option or a variable with a key that is written out: --api-key, HF_TOKEN=…; $NAME is none
KEY_OPTION = re.compile(
    r"(^|[\s=])(--([\w-]+-)?(key|token|secret|password)(=|$)|\w*(key|token|secret|password)=[^$])",
    re.IGNORECASE,
)
CAP = 2.0  # the usual one: examples of verl, Open Instruct; TRL began with it, and has 3 now


@dataclass
class Rollouts:
    """The keys of every sampler. Keep top_k 0 and top_p 1: the trained log-probabilities are those
    of the whole softmax (algorithm.md 5.7)."""

    # of sampling and of every log-probability of this run; above 0: greedy rollouts have no
    # gradient
    temperature: Annotated[float, Range(0, open=True)] = 1.0
    top_k: Annotated[int, Range(0)] = 0  # draw among the k likeliest tokens; 0: off
    # draw from the smallest set of tokens that holds this probability
    top_p: Annotated[float, Range(0, 1, open=True)] = 1.0
    # tokens of a response, end-of-text included; 0: the data's max_response
    max_response: Annotated[int, Range(0)] = 0
    # truncated: importance weights, where the sampler's probabilities differ from the trainer's
    correction: Annotated[str, OneOf("none", "truncated")] = "none"
    correction_cap: Annotated[float, Range(1)] = CAP  # the largest weight of a token

    data_max_response: int = from_runtime("max_response")
    seed: int = from_runtime("seed")

    def problems(self) -> Iterator[UserError]:
        if self.correction == "none" and self.correction_cap != CAP:
            what = "is not read: correction is none"
            yield UserError(what, where="correction_cap", fix="correction: truncated")

    def start(self) -> None:
        """Start what responses need beside the actor, before models take their time to load."""

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
        return self.respond(actor, prompts, sampling)

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Return one response a row, drawn as `sampling` describes."""
        raise NotImplementedError

    def token_weights(self, logprobs: Tensor, rollout: Rollout) -> Tensor:
        """Return min(pi_train / pi_sampler, correction_cap) of each token, [B, T]; 1 without a
        correction, and outside the mask.

        logprobs [B, T] are the trainer's. Without the cap, the mean of w_t f_t over the sampler's
        tokens is the mean of f_t over the trainer's; the cap bounds its variance and biases it
        towards the sampler (Ionides 2008; for language models Yao et al. 2025, as in verl, TRL and
        NeMo-RL). States stay the sampler's. With top_k or top_p the sampler's log-probs are those
        of the truncated distribution, so the weights are right for each token that it can draw;
        the tokens that it cannot draw are missing, as without a correction.

        Raises UserError for a correction of a rollout without log-probs.
        """
        if self.correction == "none":
            return torch.ones_like(logprobs)
        if rollout.generation_logprobs is None:
            raise UserError(
                "the sampler gives no log-probs of its tokens, which a correction reads",
                where="algorithm.rollout.correction",
                fix="algorithm.rollout.correction=none, or a sampler that returns them",
            )
        return token_ratios(logprobs, rollout).clamp(max=self.correction_cap)


def token_ratios(logprobs: Tensor, rollout: Rollout) -> Tensor:
    """Return pi_train / pi_sampler of each token, [B, T]; 1 outside the mask."""
    assert rollout.generation_logprobs is not None
    gap = logprobs - rollout.generation_logprobs
    return torch.where(rollout.mask, gap, 0.0).exp()


@final
@register("rollout", "sampling")
@dataclass
class SamplingRollout(Rollouts):
    """Sample responses from the actor itself."""

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout:
        return actor.generate(prompts, sampling)


@final
@register("rollout", "vllm")
@dataclass
class VLLMRollout(Rollouts):
    """Sample responses on a vLLM server, which is given the actor's weights before each rollout."""

    url: str = ""  # of a server that runs; "": one is started, as `serve` describes
    serve: Serve = field(default_factory=Serve)
    # file: on the server's host, through its memory | broadcast: torch.distributed
    transfer: Annotated[str, OneOf("file", "broadcast")] = "file"
    # seconds without any finished response, and of a control request
    timeout: Positive = 600.0

    connect: Callable[[VLLMRollout], RolloutServer] = from_runtime("connect")

    def problems(self) -> Iterator[UserError]:
        yield from super().problems()
        if self.url and (what := address_problem(self.url)):
            fix = "http://HOST:PORT, or '' to start a server; export VLLM_API_KEY=… for its key"
            yield UserError(what, where="url", fix=fix)
        if any(KEY_OPTION.search(word) for word in (*self.serve.args, *self.serve.command)):
            what = "an option contains a key, which the run folder would show"
            yield UserError(what, where="serve", fix="remove it, and export VLLM_API_KEY=…")
        if self.url and self.serve != Serve():
            what = "is not read: the server at `url` runs already"
            yield UserError(what, where="serve", fix="remove one of serve and url")
        if self.serve.command and (self.serve.python or self.serve.args):
            what = "python and args are not read: command replaces them"
            yield UserError(what, where="serve", fix="remove command, or python and args")

    @cached_property
    def _server(self) -> RolloutServer:
        return self.connect(self)

    def start(self) -> None:
        _ = self._server  # reading it connects

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout:
        return self._server.respond(actor, prompts, sampling)
