"""Models of well-known shapes with random weights made on the device, and the training step that
parts measure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gipo_megatron.megatron import model
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import placements
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Architecture, Optimisation, Precision
from gipo_megatron.telemetry.performance import PEAK_FLOPS, num_parameters
from gipo_megatron.types import Loss, Prompts, Sequences, TokenStats

SEVEN_B = Architecture(  # Llama-2-7B
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_positions=4096,
)
ONE_B = Architecture(  # Llama-3.2-1B
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_positions=4096,
    rope_base=500000.0,
    tied_embeddings=True,
)
SMALL = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_heads": 4,
    "head_dim": 16,
    "vocab_size": 320,
}
NO_TEXT_END = -1  # no token ends a response: all are of full length


def shape(whole: Architecture, tiny: bool, num_layers: int | None = None) -> Architecture:
    """A known shape; tiny: its kind (tied or not, grouped or not) at a width for tests."""
    layers = num_layers or whole.num_layers
    if not tiny:
        return replace(whole, num_layers=layers)
    kv_heads = max(1, 4 * whole.num_kv_heads // whole.num_heads)
    return replace(whole, **SMALL, num_kv_heads=kv_heads, num_layers=min(layers, 4))


@dataclass(frozen=True)
class Step:
    """One optimizer step of `rows` sequences of `length` tokens."""

    architecture: Architecture
    rows: int
    micro_batch: int
    length: int
    recompute: str = "none"
    fp8: str = "none"

    @property
    def flops(self) -> float:
        """6 per weight and token in the layers and the output layer; 6 · s · heads · head_dim per
        layer and token for causal attention.

        What is computed again in the backward pass does not count; an embedding is looked up, not
        multiplied.
        """
        a = self.architecture
        # tied: counted once, and multiplied in the output layer
        lookup = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size
        attention = a.num_layers * self.length * a.num_heads * a.head_dim
        return 6.0 * (num_parameters(a) - lookup + attention) * self.rows * self.length


def supervised(output: TokenStats, rows: Sequences) -> Loss:
    return Loss({"sft": (-(output.logprobs * rows.mask).sum(), "token")})


def random_text(step: Step) -> Sequences:
    """Whole rows of random tokens; all but the first count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        1, step.architecture.vocab_size, (step.rows, step.length), generator=generator
    )
    lengths = torch.full((step.rows,), step.length)
    mask = (torch.arange(step.length) > 0).expand(step.rows, -1)
    return Sequences(
        tokens, mask, torch.ones(step.rows, dtype=torch.long), lengths, torch.arange(step.rows)
    )


def random_prompts(architecture: Architecture, rows: int, width: int) -> Prompts:
    tokens = torch.randint(
        1, architecture.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0)
    )
    ids = torch.arange(rows)
    return Prompts(tokens, torch.full((rows,), width), ids, ids, ("",) * rows, ({},) * rows)


def new_actor(
    mesh: Mesh, architecture: Architecture, precision: Precision, **more: Any
) -> MegatronActor:
    """Random weights, made on the device."""
    with weights_on_device():
        engine = build_engine("actor", mesh, architecture, precision, **more)
    return MegatronActor(engine, eos_id=NO_TEXT_END, pad_id=0, decode=str)


def trained_actor(mesh: Mesh, step: Step, **more: Any) -> MegatronActor:
    """A bf16 actor for `step`, with an optimizer."""
    common = {
        "micro_batch": step.micro_batch,
        "optimisation": Optimisation(lr=1e-5),
        "recompute": step.recompute,
    }
    return new_actor(mesh, step.architecture, Precision("bf16", step.fp8), **{**common, **more})


@contextmanager
def weights_on_device() -> Iterator[None]:
    """Models built inside get normal(0, 0.02) weights where they lie: a host core makes 0.1 billion
    numbers a second."""
    with patch.object(model, "initialise_weights", _fill):
        yield


@torch.no_grad()
def _fill(
    chunks: list[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    seed: int,
    only: Collection[str] | None = None,
) -> None:
    count = itertools.count(1000 * seed)
    for chunk in chunks:
        for place, parameter in placements(chunk, architecture.vocab_size):
            if only is not None and place.name not in only:
                continue
            if place.name.endswith("layernorm.weight"):
                parameter.fill_(1.0)
            elif place.name.endswith(".bias"):
                parameter.zero_()
            else:
                generator = torch.Generator(parameter.device).manual_seed(next(count))
                parameter.normal_(0.0, 0.02, generator=generator)


def peak_flops() -> float | None:
    """Of this device, dense bf16; None where the data sheet is not at hand."""
    if not torch.cuda.is_available():
        return None
    return next(
        (rate for chip, rate in PEAK_FLOPS.items() if chip in torch.cuda.get_device_name()), None
    )
