"""A model and a text that it learns within a few steps: each token follows from the one before."""

from __future__ import annotations

from typing import Any

import torch

from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.metrics import Metric
from gipo_megatron.specs import Architecture, Optimisation, Precision
from gipo_megatron.types import Loss, Sequences, TokenStats

SHAPE = Architecture(  # 256 wide: blockwise FP8 may find no algorithm for narrower products
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=256,
    max_positions=256,
)
ROWS = 32  # of a batch
ADAM = Optimisation(lr=2e-3, warmup_steps=5)


def text(step: int, rows: int = 0, length: int = 64) -> Sequences:
    """ROWS rows, or `rows`, of x_(t+1) = 5 x_t + 3 modulo 251, from a random start; a
    new batch each step."""
    rows, generator = rows or ROWS, torch.Generator().manual_seed(step)
    columns = [torch.randint(0, 251, (rows,), generator=generator)]
    for _ in range(length - 1):
        columns.append((5 * columns[-1] + 3) % 251)
    mask = (torch.arange(length) > 0).expand(rows, -1)
    return Sequences(
        torch.stack(columns, 1),
        mask,
        torch.ones(rows, dtype=torch.long),
        torch.full((rows,), length),
        torch.arange(rows),
    )


def loss(output: TokenStats, rows: Sequences) -> Loss:
    nll = -(output.logprobs * rows.mask)
    return Loss({"sft": (nll.sum(), "token")}, {"loss": Metric.mean(-output.logprobs[rows.mask])})


def new_actor(mesh: Mesh, fp8: str = "none", **changes: Any) -> MegatronActor:
    base = {
        "architecture": SHAPE,
        "precision": Precision("bf16", fp8),
        "micro_batch": 16,
    }
    engine = build_engine("actor", **{"mesh": mesh, **base, "optimisation": ADAM, **changes})
    return MegatronActor(engine, eos_id=1, pad_id=0, decode=str)


def learn(actor: MegatronActor, first: int, last: int) -> list[float]:
    """The loss of steps first … last - 1, each before its update."""
    return [
        actor.update((text(step), loss)).metrics["loss"].result() for step in range(first, last)
    ]
