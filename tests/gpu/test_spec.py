"""Transformer Engine's layers against the local ones: the same weights, the same logits and gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

from gipo_megatron.megatron import precision
from gipo_megatron.megatron.layout import placements
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Precision
from tests.gpu.learning import SHAPE, loss, new_actor, text
from tests.parity.tiny import relative_errors

TOLERANCE = 3e-2  # relative


def test_logits_and_gradients(mesh: Mesh, transformer_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16: fp32 layers are never Transformer Engine's."""
    rows = text(0, rows=4)
    theirs = new_actor(mesh, precision=Precision("bf16"))
    monkeypatch.setattr(precision, "transformer_engine_usable", lambda: False)
    ours = new_actor(mesh, precision=Precision("bf16"))
    kinds = [{type(m).__name__ for m in actor.engine.chunks[0].modules()} for actor in (theirs, ours)]
    assert "TELayerNormColumnParallelLinear" in kinds[0] and not any(name.startswith("TE") for name in kinds[1])

    weights = [
        {place.name: p for place, p in placements(actor.engine.chunks[0], SHAPE.vocab_size)} for actor in (theirs, ours)
    ]  # by layout-free names
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 4 * 6 + 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    logits = [actor.engine.chunks[0](rows.tokens.to(mesh.device), None, None).float() for actor in (theirs, ours)]
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < TOLERANCE
    gradients = []
    for actor in (theirs, ours):
        actor.engine.backward([(rows, loss)], actor.readout)
        gradients.append({name: g.float().clone() for name, g in actor.engine.gradients()})
    errors = relative_errors(*gradients)
    assert len(errors) == 4 * 9 + 3 and max(errors.values()) < TOLERANCE, errors


def test_embedding_and_output_layer_are_none_of_transformer_engines(mesh: Mesh, transformer_engine: None) -> None:
    chunk = new_actor(mesh).engine.chunks[0]
    assert type(chunk.output_layer) is ColumnParallelLinear and type(chunk.embedding.word_embeddings) is VocabParallelEmbedding
