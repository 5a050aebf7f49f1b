"""Actor, reference, critic and reward model: an Engine each, and how its last stage's output is
read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gipo_megatron.megatron.engine import Engine, Part
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.heads import all_logits, hidden_at, output_weight, take_hidden
from gipo_megatron.megatron.microbatches import MicroBatch, Readout
from gipo_megatron.megatron.offload import Snapshot
from gipo_megatron.megatron.outputs import critic_output, last_token_score, token_stats
from gipo_megatron.specs import Sampling
from gipo_megatron.types import CriticOutput, Output, Prompts, Rollout, Rows, TokenStats, Update
from gipo_megatron.weights.end_tokens import end_ids


@torch.no_grad()
def outputs(engine: Engine, ids: Tensor) -> Tensor:
    """Return logits [b, T, V], or a head's [b, T, 1], of whole rows of tokens.

    For one process that holds the whole model.
    """
    assert engine.mesh.world == 1 and len(engine.chunks) == 1, (
        "needs the whole model in one process"
    )
    with engine.ready():
        (chunk,) = engine.chunks
        out: Tensor = chunk(ids.to(engine.mesh.device), None, None)
        if engine.head is not None:
            take_hidden(chunk)  # not needed, so not kept
            return out.cpu()
        logits = all_logits(chunk, out)
    return logits[..., : engine.architecture.vocab_size].float().cpu()


def language_readout(engine: Engine, temperature: float, entropy: bool) -> Readout:
    """Return a function that reads log-probs (and entropy) of the response tokens at
    `temperature`."""

    def read(hidden: Tensor, slot: MicroBatch) -> Output:
        assert slot.positions is not None, (
            "the first token is inside the mask, but nothing predicts it"
        )
        return token_stats(
            hidden,
            output_weight(engine.chunks[-1]),
            slot.sequences,
            slot.positions,
            vocab_size=engine.architecture.vocab_size,
            mesh=engine.mesh,
            temperature=temperature,
            entropy=entropy,
        )

    return read


@dataclass
class MegatronActor:
    """The policy, at the one `temperature` that it samples and trains at. Its responses end at the
    tokenizer's `eos_id`, and at the end tokens that the files of its weights name."""

    engine: Engine
    eos_id: int
    pad_id: int
    decode: Callable[[list[int]], str]
    temperature: float = 1.0

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def end_ids(self) -> tuple[int, ...]:
        return end_ids(self.engine.hf_files, self.eos_id)

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        engine = self.engine
        with engine.ready():
            return generate(
                engine.chunks,
                engine.architecture,
                engine.mesh,
                prompts,
                sampling,
                self.end_ids,
                self.pad_id,
                self.decode,
            )

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        stats = self.engine.forward(batch, language_readout(self.engine, self.temperature, entropy))
        assert isinstance(stats, TokenStats)
        return stats

    def readout(self, hidden: Tensor, slot: MicroBatch) -> Output:
        """Return the input of the losses. The entropy comes with the log-probs' own collectives,
        and has a gradient where a loss uses it."""
        return language_readout(self.engine, self.temperature, entropy=True)(hidden, slot)

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.engine.export()


@dataclass
class MegatronReference:
    """The frozen policy that KL is measured from.

    state: the reference's weights, where it has no model of its own: they are swapped into
    `engine`, the policy's, for each call (`build.snapshot_of`).
    """

    engine: Engine
    temperature: float = 1.0
    state: Snapshot | None = None

    def logprobs(self, batch: Rows) -> TokenStats:
        read = language_readout(self.engine, self.temperature, entropy=False)
        if self.state is None:
            stats = self.engine.forward(batch, read)
        else:
            with self.engine.swapped(self.state):
                stats = self.engine.forward(batch, read)
        assert isinstance(stats, TokenStats)
        return stats


@dataclass
class MegatronCritic:
    """Value of each token's state and, with a group head, group logits of each sequence, from one
    trunk."""

    engine: Engine

    def readout(self, raw: Tensor, slot: MicroBatch) -> Output:
        hidden = take_hidden(self.engine.chunks[-1])
        return critic_output(raw, hidden, slot.sequences, self.engine.group_head)

    def evaluate(self, batch: Rows) -> CriticOutput:
        output = self.engine.forward(batch, self.readout)
        assert isinstance(output, CriticOutput)
        return output

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)


@dataclass
class MegatronRewardModel:
    """One score per sequence, read at its last token."""

    engine: Engine

    def readout(self, raw: Tensor, slot: MicroBatch) -> Output:
        take_hidden(self.engine.chunks[-1])  # not needed, so not kept
        return last_token_score(raw, slot.sequences)

    def score(self, batch: Rows) -> Tensor:
        scores = self.engine.forward(batch, self.readout)
        assert isinstance(scores, Tensor)
        return scores

    def features(self, batch: Rows, position: str) -> Tensor:
        """Return the last hidden states [B, H] at the last prompt token, or at the last token."""

        def read(raw: Tensor, slot: MicroBatch) -> Output:
            hidden = take_hidden(self.engine.chunks[-1])
            return hidden_at(hidden, slot.sequences, position, self.engine.mesh)

        features = self.engine.forward(batch, read)
        assert isinstance(features, Tensor)
        return features

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)
