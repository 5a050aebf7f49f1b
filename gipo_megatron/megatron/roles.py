"""Actor, reference, critic and reward model on Megatron-Core: an Engine each, and what is read from
its last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.checkpoint import check_architecture, kind, load_weights, read_hf_files
from gipo_megatron.megatron.engine import Engine, Part
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.heads import take_hidden
from gipo_megatron.megatron.hf import Seen, ignore, load_group_head, load_hf
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.microbatches import MicroBatch, Readout
from gipo_megatron.megatron.model import initialise_weights
from gipo_megatron.megatron.offload import Snapshot
from gipo_megatron.megatron.outputs import critic_output, last_token_score, token_stats
from gipo_megatron.specs import Architecture, HeadSpec, Optimisation, Precision, Sampling
from gipo_megatron.types import CriticOutput, Output, Prompts, Rollout, Rows, TokenStats, Update
from gipo_megatron.weights.hf_config import architecture_from_hf


def load_into(engine: Engine, load: str, role: str, seen: Seen = ignore) -> str:
    """Fill a model with weights, told by content: an HF folder, a checkpoint, or "random" (what it
    was built with).

    Returns what was taken ("random", "huggingface", or the checkpoint's role). Collective. Raises
    UserError when nothing fits, or when config.json describes another model than this one, in
    whatever number.
    """
    if load == "random":
        return load
    path = Path(load)
    if kind(path) == "checkpoint":
        return load_weights(path, role, engine)
    check_architecture(
        path / "config.json", asdict(architecture_from_hf(path)), engine.architecture
    )
    with engine.residency.use(training=engine.optimisation is not None):
        load_hf(path, engine.chunks, engine.mesh, engine.architecture, head=engine.head, seen=seen)
        if engine.group_head is not None:
            load_group_head(path, engine.group_head)
        engine.weights_changed()
    engine.hf_files = read_hf_files(path)
    return "huggingface"


@torch.no_grad()
def outputs(engine: Engine, ids: Tensor) -> Tensor:
    """Logits [b, T, V], or a head's [b, T, 1], of whole rows of tokens; for one process that holds
    the whole model."""
    assert engine.mesh.world == 1 and len(engine.chunks) == 1, (
        "needs the whole model in one process"
    )
    with engine.ready():
        out: Tensor = engine.chunks[0](ids.to(engine.mesh.device), None, None)
    if engine.head is not None:
        take_hidden(engine.chunks[0])  # not needed, so not kept
        return out.cpu()
    return out[..., : engine.architecture.vocab_size].float().cpu()


def language_readout(engine: Engine, temperature: float, entropy: bool) -> Readout:
    """Log-probs (and entropy) of the response tokens at `temperature`."""

    def read(logits: Tensor, slot: MicroBatch) -> Output:
        assert slot.positions is not None, (
            "the first token is inside the mask, but nothing predicts it"
        )
        return token_stats(
            logits,
            slot.sequences,
            slot.positions,
            vocab_size=engine.architecture.vocab_size,
            mesh=engine.mesh,
            temperature=temperature,
            entropy=entropy,
        )

    return read


class MegatronActor:
    """The policy. `temperature` is the one it samples and trains at; without `optimisation` it only
    generates and scores."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        architecture: Architecture,
        precision: Precision,
        micro_batch: int,
        seed: int,
        load: str,
        eos_id: int,
        pad_id: int,
        decode: Callable[[list[int]], str],
        optimisation: Optimisation | None = None,
        temperature: float = 1.0,
        recompute: str = "none",
        offload: str = "none",
    ) -> None:
        self.engine = Engine(
            mesh,
            architecture,
            precision,
            micro_batch=micro_batch,
            seed=seed,
            optimisation=optimisation,
            recompute=recompute,
            offload=offload,
            initialise=load == "random",
        )
        self.eos_id, self.pad_id, self.decode, self.temperature = (
            eos_id,
            pad_id,
            decode,
            temperature,
        )
        self.loaded_from = load_into(self.engine, load, "actor")

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        engine = self.engine
        with engine.ready():
            return generate(
                engine.chunks,
                engine.architecture,
                engine.mesh,
                prompts,
                sampling,
                self.eos_id,
                self.pad_id,
                self.decode,
            )

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        stats = self.engine.forward(batch, language_readout(self.engine, self.temperature, entropy))
        assert isinstance(stats, TokenStats)
        return stats

    def readout(self, logits: Tensor, slot: MicroBatch) -> Output:
        """What the losses see. The entropy comes with the log-probs' own collectives, and has a
        gradient where a loss uses it."""
        return language_readout(self.engine, self.temperature, entropy=True)(logits, slot)

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.engine.export()


class MegatronReference:
    """The frozen policy that KL is measured from.

    live: with offload "cpu", a policy of the same architecture: the reference then has no model of
    its own, only a host copy of its weights that is swapped into the policy's model for each call.
    Must be made before the policy is trained or restored.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        architecture: Architecture,
        precision: Precision,
        micro_batch: int,
        seed: int,
        load: str,
        temperature: float = 1.0,
        offload: str = "none",
        live: MegatronActor | None = None,
    ) -> None:
        self.temperature = temperature
        self.state: Snapshot | None = None
        if offload == "cpu" and live is not None:
            self.engine = live.engine
            self.loaded_from = self._copy(load, seed, architecture)
            return
        self.engine = Engine(
            mesh,
            architecture,
            precision,
            micro_batch=micro_batch,
            seed=seed,
            offload=offload,
            initialise=load == "random",
        )
        self.loaded_from = load_into(self.engine, load, "reference")

    def _copy(self, load: str, seed: int, architecture: Architecture) -> str:
        engine = self.engine
        if architecture != engine.architecture:
            raise UserError(
                "the reference is of another architecture than the actor",
                where="models.reference",
                fix="offload: none",
            )
        with engine.swapped(engine.snapshot()):
            engine.scaling.write({})  # what is loaded brings its own, or has none
            if load == "random":
                initialise_weights(engine.chunks, architecture, engine.mesh, seed)
            actors = engine.hf_files
            source = load_into(engine, load, "reference")
            engine.hf_files = actors
            self.state = engine.snapshot()
        with engine.residency.use(training=engine.optimisation is not None):
            engine.weights_changed()
        return source

    def logprobs(self, batch: Rows) -> TokenStats:
        read = language_readout(self.engine, self.temperature, entropy=False)
        if self.state is None:
            stats = self.engine.forward(batch, read)
        else:
            with self.engine.swapped(self.state):
                stats = self.engine.forward(batch, read)
        assert isinstance(stats, TokenStats)
        return stats


class MegatronCritic:
    """Value of each token's state and, with a HeadSpec, group logits of each sequence, from one
    trunk."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        architecture: Architecture,
        precision: Precision,
        micro_batch: int,
        seed: int,
        load: str,
        optimisation: Optimisation | None = None,
        head: HeadSpec | None = None,
        recompute: str = "none",
        offload: str = "none",
    ) -> None:
        self.engine = Engine(
            mesh,
            architecture,
            precision,
            micro_batch=micro_batch,
            seed=seed,
            head="value",
            group=head,
            optimisation=optimisation,
            recompute=recompute,
            offload=offload,
            initialise=load == "random",
        )
        self.loaded_from = load_into(self.engine, load, "critic")

    def readout(self, raw: Tensor, slot: MicroBatch) -> Output:
        return critic_output(
            raw, take_hidden(self.engine.chunks[-1]), slot.sequences, self.engine.group_head
        )

    def evaluate(self, batch: Rows) -> CriticOutput:
        output = self.engine.forward(batch, self.readout)
        assert isinstance(output, CriticOutput)
        return output

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)


class MegatronRewardModel:
    """One score per sequence, read at its last token."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        architecture: Architecture,
        precision: Precision,
        micro_batch: int,
        seed: int,
        load: str,
        optimisation: Optimisation | None = None,
        recompute: str = "none",
        offload: str = "none",
    ) -> None:
        self.engine = Engine(
            mesh,
            architecture,
            precision,
            micro_batch=micro_batch,
            seed=seed,
            head="score",
            optimisation=optimisation,
            recompute=recompute,
            offload=offload,
            initialise=load == "random",
        )
        self.loaded_from = load_into(self.engine, load, "reward")

    def readout(self, raw: Tensor, slot: MicroBatch) -> Output:
        take_hidden(self.engine.chunks[-1])  # not needed, so not kept
        return last_token_score(raw, slot.sequences)

    def score(self, batch: Rows) -> Tensor:
        scores = self.engine.forward(batch, self.readout)
        assert isinstance(scores, Tensor)
        return scores

    def update(self, *parts: Part) -> Update:
        return self.engine.update(parts, self.readout)
