"""Rollouts from a server that rank 0 alone uses.

prompts of all replicas ─▶ rank 0: the actor's weights, if they changed; one request a response ─▶
answers to all ranks, which keep their own rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gipo_megatron.errors import SamplerLost, UserError
from gipo_megatron.roles import Actor, World
from gipo_megatron.rollouts import join
from gipo_megatron.serving.client import Answer, Request, ServerLost
from gipo_megatron.serving.server import Server
from gipo_megatron.specs import Sampling
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Prompts, Rollout


@dataclass
class ServerRollouts:
    """Responses by a server that is given the actor's weights whenever they changed.

    `server` is used on rank 0 alone. A response depends on its prompt, the weights and (seed,
    step, sample_id), as far as the server computes a row alike in every batch.
    """

    world: World
    server: Server
    device: torch.device
    pad_id: int
    decode: Callable[[list[int]], str]
    _holds: tuple[Actor, int] | None = field(default=None, init=False)  # actor, its version

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Return one response a row. Collective over the whole world.

        A lost server is replaced, given the weights again, and gets the requests that are left.
        Raises SamplerLost where that is of no use; the actor has not changed.
        """
        replicas = self.world.gather(requests(prompts, sampling, actor.end_ids))
        first = sum(map(len, replicas[: self.world.replica]))
        try:
            answers = self._draw(actor, [request for rows in replicas for request in rows])
        except UserError as error:
            fix = f"{error.fix}; then the same command continues"
            raise SamplerLost(error.what, where=error.where, fix=fix) from error
        return self._rollout(prompts, answers[first : first + len(prompts)], actor.end_ids)

    def _draw(self, actor: Actor, wanted: Sequence[Request]) -> list[Answer]:
        """Return the answers to `wanted`, in its order."""
        answers: dict[int, Answer] = {}  # rank 0's; those that came before a loss are kept

        def draw() -> list[Answer] | None:
            try:
                self.server.draw(wanted, answers)
            except ServerLost as reason:
                self.server.replace(reason)
                return None
            return [answers[i] for i in range(len(wanted))]

        while True:
            if self._push(actor) and (drawn := self.world.from_main(draw)) is not None:
                return drawn
            self._holds = None

    def _push(self, actor: Actor) -> bool:
        """Give the server the actor's weights, unless it has them. Returns False where the server
        was lost and replaced."""
        if self._holds is not None:
            held, version = self._holds
            if held is actor and version == actor.version:
                return True
        self._holds = None
        failure = self._send(self._together(actor.export_weights()))

        def settle() -> bool:
            if isinstance(failure, ServerLost):
                self.server.replace(failure)
            elif failure is not None:
                raise failure
            return failure is None

        pushed = self.world.from_main(settle)
        if pushed:
            self._holds = (actor, actor.version)
        return pushed

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> ServerLost | UserError | None:
        """Iterate the weights to their end on every rank; rank 0 sends them. Returns its error."""
        if not self.world.is_main:
            for _ in weights:
                pass
            return None
        try:
            self.server.push(weights)
        except (ServerLost, UserError) as error:
            return error
        return None

    def _together(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield a tensor when rank 0 is ready for it. The export is collective, and its collectives
        have a time limit, which a slow server would exceed; from_main has none."""
        while True:
            self.world.from_main(lambda: None)
            found = next(weights, None)
            if found is None:
                return
            yield found

    def _rollout(
        self, prompts: Prompts, answers: Sequence[Answer], end_ids: Sequence[int]
    ) -> Rollout:
        """Pad the answers, and join them with their prompts."""
        counts = torch.tensor([len(answer.token_ids) for answer in answers], dtype=torch.long)
        shape = (len(answers), max((len(answer.token_ids) for answer in answers), default=1))
        responses, logprobs = torch.full(shape, self.pad_id), torch.zeros(shape)
        for row, answer in enumerate(answers):
            responses[row, : counts[row]] = torch.tensor(answer.token_ids)
            logprobs[row, : counts[row]] = torch.tensor(answer.logprobs)
        device = self.device
        return join(
            prompts.to(device),
            responses.to(device),
            counts.to(device),
            logprobs.to(device),
            end_ids,
            self.pad_id,
            self.decode,
        )


def requests(prompts: Prompts, sampling: Sampling, end_ids: Sequence[int]) -> list[Request]:
    """Return one request a row, in vLLM's terms."""
    shared: dict[str, Any] = {
        "max_tokens": sampling.max_response,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": True,  # the server's own eos; ours are the stop ids
        "stop_token_ids": list(end_ids),
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    lengths, samples = prompts.lengths.tolist(), prompts.sample_id.tolist()
    rows = zip(prompts.tokens.tolist(), lengths, samples, strict=True)
    return [
        Request(tokens[:length], {**shared, "seed": request_seed(sampling, sample)})
        for tokens, length, sample in rows
    ]


def request_seed(sampling: Sampling, sample_id: int) -> int:
    """Return 63 bits of a hash of (seed, step, sample_id): vLLM's seeds are signed."""
    text = f"{sampling.seed} {sampling.step} {sample_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
