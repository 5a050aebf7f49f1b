"""Part `te`: Transformer Engine's layers against the local ones: the same weights, logits,
gradients, and checkpoints of each other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron import precision as number_formats
from gipo_megatron.megatron.roles import MegatronActor, outputs
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tools.gpu import adapters
from tools.gpu.bench import Bench, Figure, below, equal, figure, true
from tools.gpu.learning import learn, loss, new_actor, text
from tools.gpu.tiny import relative_errors

CLOSE = 3e-2  # relative: bf16 rounds in other places
FP8_CLOSE = 0.1
TENSORS = 4 * 9 + 3  # Hugging Face's names, of the learning model


def te(bench: Bench) -> Iterator[Figure]:
    yield from imported(bench)
    theirs = new_actor(bench.mesh)
    with local_layers():
        ours = new_actor(bench.mesh)
    yield equal(
        "layers of Transformer Engine, and of our own",
        f"{engine_layers(theirs) > 0}, {engine_layers(ours)}",
        "True, 0",
    )
    outside = (
        theirs.engine.chunks[0].output_layer,
        theirs.engine.chunks[0].embedding.word_embeddings,
    )
    modules = [[base.__module__ for base in type(m).__mro__] for m in outside]
    yield true(
        "embedding and output layer are Megatron-Core's, or subclasses",
        all("megatron.core.tensor_parallel.layers" in names for names in modules),
    )
    yield from compared(theirs, ours)
    yield from moved(bench, theirs, ours)
    yield from adapters.with_transformer_engine(bench)


def imported(bench: Bench) -> Iterator[Figure]:
    """The library itself, and one FP8 product."""
    import transformer_engine
    import transformer_engine.pytorch as library
    from transformer_engine.common.recipe import Float8CurrentScaling

    yield figure("version", str(transformer_engine.__version__))
    g = torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(256, 512, device=bench.device, generator=g).bfloat16()
    layer = library.Linear(512, 256, bias=False, params_dtype=torch.bfloat16, device=bench.device)
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.02, generator=g)
        plain = layer(x).float()
        with library.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            eight = layer(x).float()
    error = float((eight - plain).norm() / plain.norm())
    yield below("FP8 product against bf16", error, FP8_CLOSE)
    yield true("FP8 product is not bf16's", error > 0)


@contextmanager
def local_layers() -> Iterator[None]:
    """Models built inside have none of Transformer Engine's layers, though it is there."""
    with patch.object(number_formats, "transformer_engine_usable", lambda: False):
        yield


def engine_layers(actor: MegatronActor) -> int:
    return sum(type(m).__name__.startswith("TE") for m in actor.engine.chunks[0].modules())


def compared(theirs: MegatronActor, ours: MegatronActor) -> Iterator[Figure]:
    """Initial weights bit for bit, logits and gradients of one batch."""
    yield true(
        "the same initial weights, bit for bit",
        same(dict(theirs.export_weights()), dict(ours.export_weights())),
    )
    rows = text(0, rows=4)
    logits = [outputs(actor.engine, rows.tokens) for actor in (theirs, ours)]
    yield below("logits", float((logits[0] - logits[1]).norm() / logits[1].norm()), CLOSE)
    gradients = []
    for actor in (theirs, ours):
        actor.engine.backward([(rows, loss)], actor.readout)
        gradients.append({name: g.float().clone() for name, g in actor.engine.gradients()})
    errors = relative_errors(*gradients)
    yield equal("tensors with a gradient", len(errors), TENSORS)
    worst = max(errors, key=lambda name: errors[name])
    yield below(f"gradients, {worst}", errors[worst], CLOSE)


def moved(bench: Bench, theirs: MegatronActor, ours: MegatronActor) -> Iterator[Figure]:
    """A trained model from the local layers to Transformer Engine's and back: weights and optimizer
    are the same afterwards."""
    learn(ours, 0, 2)
    weights = {name: w.clone() for name, w in ours.export_weights()}
    learn(theirs, 2, 3)  # so that there is something to overwrite
    for number, (source, target) in enumerate([(ours, theirs), (theirs, ours)]):
        folder = bench.scratch / f"te_{number}"
        path = checkpoint.save(folder, {"actor": source.engine}, bench.mesh, CheckpointMeta(2))
        if source is theirs:
            learn(ours, 3, 4)
        checkpoint.restore(path, {"actor": target.engine}, bench.mesh)
        shutil.rmtree(folder)
        name = "local → Transformer Engine" if target is theirs else "Transformer Engine → local"
        yield true(f"checkpoint {name}, bit for bit", same(weights, dict(target.export_weights())))


def same(a: Any, b: Any) -> bool:
    """Tensors, or dictionaries of them at any depth, bit for bit."""
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    return isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
