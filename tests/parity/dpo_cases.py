"""The real DPO page on Megatron roles: its loss and gradients against plain torch over Hugging
Face's models, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gipo_megatron.algorithms.dpo import DPO
from gipo_megatron.algorithms.pair_reference import (
    LiveReference,
    PairReference,
    PrecomputedReference,
    Split,
)
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.types import Pairs, Sequences
from tests.parity import plain_ppo, tiny
from tests.parity.ppo_cases import OffPolicy
from tests.parity.roles import fill, mine, new_actor
from tests.parity.tiny import relative_errors

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 1.0},
    "precomputed": {"precompute": True},
    "smoothed": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "mean": {"length_normalise": True, "beta": 2.0},
    "ipo_mean": {"loss": "ipo", "length_normalise": True},
}


def _log_probs(model: LlamaForCausalLM, rows: Sequences) -> Tensor:
    """[B, T] of the response tokens, zero elsewhere."""
    return tiny.hf_token_stats(model, rows).logprobs


@cache
def plain_dpo(variant: str, adapted: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients {HF name: tensor} of the whole batch, pair by pair as the papers write
    it."""
    keys, pairs = VARIANTS[variant], tiny.pairs()
    beta, eps = keys.get("beta", 0.1), keys.get("label_smoothing", 0.0)
    model, old = (plain_ppo.hf_model(v, adapted).double() for v in ("live", "reference"))
    ratios = []
    for half in (pairs.chosen, pairs.rejected):
        with torch.no_grad():
            reference = _log_probs(old, half)
        ratio = (_log_probs(model, half) - reference).sum(1)
        ratios.append(ratio / half.mask.sum(1) if keys.get("length_normalise") else ratio)
    h = ratios[0] - ratios[1]
    if keys.get("loss") == "ipo":
        loss = ((h - 1 / (2 * beta)) ** 2).mean()
    else:
        loss = -(
            (1 - eps) * torch.sigmoid(beta * h).log() + eps * torch.sigmoid(-beta * h).log()
        ).mean()
    loss.backward()
    return loss.detach(), {
        name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None
    }


def _own(mesh: Mesh) -> Pairs:
    pairs = mine(mesh, tiny.pairs())
    assert isinstance(pairs, Pairs)
    return pairs


def _pairs_at(rows: Sequence[int], dp_rank: int, dp_size: int) -> tuple[Pairs, Tensor]:
    """As Dataset.pairs_at, for a number of rows that the replicas share evenly."""
    mine_ = torch.tensor(rows)[dp_rank::dp_size]
    return tiny.pairs().select(mine_), torch.ones(len(mine_), dtype=torch.bool)


def dpo_cells(
    mesh: Mesh,
    layout: str,
    micro_batches: tuple[int, ...],
    variants: Iterable[str] = VARIANTS,
    **changes: Any,
) -> dict[str, dict[str, float]]:
    """{layout/variant/1: {tensor: relative error, loss: relative error}, …}; the actor's and the
    reference's weights differ."""
    actor, cells, dp = new_actor(mesh, **changes), {}, mesh.data_parallel
    adapted = "adapter" in changes
    copies = {
        version: fill(actor, plain_ppo.hf_model(version, adapted)).engine.snapshot()
        for version in ("reference", "live")
    }
    role = OffPolicy(actor, copies["reference"])
    for variant in variants:
        keys = VARIANTS[variant]
        for micro_batch in micro_batches:
            actor.engine.micro_batch, role.gradients = micro_batch, []
            reference: PairReference = LiveReference(role)
            if keys.get("precompute"):
                splits = {"train": Split(range(len(tiny.pairs())), _pairs_at)}
                reference = PrecomputedReference(lambda: role, splits, dp, batch=2, identity="test")
            page = DPO(
                **{"precompute": False, **keys},
                actor=role,  # type: ignore[arg-type]
                reference=reference,
                pairs=lambda step: _own(mesh),
                timer=lambda name: nullcontext(),
            )
            result = page.step(0)
            assert not result.skipped
            loss, gradients = plain_dpo(variant, adapted)
            total, count = dp.sum(result.metrics["dpo/loss"].parts).tolist()
            assert count == len(tiny.pairs())
            error = abs(total / count - float(loss)) / float(loss)
            cells[f"{layout}/{variant}/{micro_batch}"] = {
                "loss": error,
                **relative_errors(role.gradients[0], gradients),
            }
    return cells
