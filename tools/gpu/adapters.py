"""Part `adapters`: adapters on a frozen base, on the device, against plain adapters on Hugging
Face's model on the CPU: log-probs, gradients, tokens, and a base that two roles share.

Part `te` runs `compared` on Transformer Engine's layers, in FP8 too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gipo_megatron.capabilities import fp8_obstacle, probe
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.hf_adapters import load_adapters
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Optimisation, Precision, Sampling
from tools.gpu import tiny
from tools.gpu.bench import Bench, Figure, below, equal, figure
from tools.gpu.parity import BF16, FP32, TIMES, prompts, relative
from tools.gpu.tiny_adapters import SPEC, adapter_tensors, hf_adapted

FP8 = 0.5  # mean difference of a log-prob; weights are ten times a real model's
RECIPES = ("tensorwise", "blockwise", "delayed")
RESPONSE = 16


def adapters(bench: Bench) -> Iterator[Figure]:
    for dtype in ("fp32", "bf16"):
        yield from compared(bench, Precision(dtype))
    yield from decoded(bench)
    yield from shared(bench)


def with_transformer_engine(bench: Bench) -> Iterator[Figure]:
    yield from compared(bench, Precision("bf16"))
    for recipe in RECIPES:
        if obstacle := fp8_obstacle(recipe, probe()):
            yield figure(f"adapters on a base in FP8, {recipe}", obstacle)
        else:
            yield from compared(bench, Precision("bf16", fp8=recipe))


def build(bench: Bench, precision: Precision, base: Base | None = None) -> Engine:
    engine = build_engine(
        "actor",
        bench.mesh,
        tiny.ARCHITECTURE,
        precision,
        micro_batch=2,
        optimisation=Optimisation(lr=1e-3),
        adapter=SPEC,
        base=base,
    )
    weights = {name: p.detach() for name, p in tiny.hf_model().named_parameters()}
    place = engine.chunks, bench.mesh, tiny.ARCHITECTURE
    load_hf(weights, *place)
    load_adapters(adapter_tensors(), *place, SPEC)
    engine.weights_changed()
    return engine


def actor(bench: Bench, precision: Precision, base: Base | None = None) -> MegatronActor:
    return MegatronActor(build(bench, precision, base), eos_id=1, pad_id=0, decode=str)


def compared(bench: Bench, precision: Precision) -> Iterator[Figure]:
    """Log-probs, and the worst adapter's gradient of a PPO loss."""
    policy, rows = actor(bench, precision), tiny.weighted()
    with torch.no_grad():
        stats = tiny.hf_token_stats(hf_adapted(), rows.inner)
    mine = policy.logprobs(rows.inner).logprobs.cpu().float()
    gap = (mine - stats.logprobs).abs()[rows.inner.mask]
    plain = tiny.hf_gradients("actor", model=hf_adapted())
    errors = relative(policy, rows, tiny.ppo_loss, plain)
    worst = max(errors, key=lambda name: errors[name])
    if precision.dtype == "fp32":
        yield below("fp32 log-probs with adapters, largest gap", float(gap.max()), FP32)
        yield below(f"fp32 gradients, {worst}", errors[worst], FP32)
        return
    if precision.fp8 != "none":
        name = f"adapters on a base in FP8, {precision.fp8}: "
        yield below(f"{name}log-probs, mean gap", float(gap.mean()), FP8)
        yield figure(f"{name}gradients' relative error, {worst}", errors[worst])
        return
    yield below("bf16 log-probs with adapters, mean gap", float(gap.mean()), BF16)
    own = tiny.relative_errors(
        tiny.hf_gradients("actor", torch.bfloat16, model=hf_adapted()), plain
    )
    # the mean: a small matrix may round well by chance, which makes its own ratio 4
    times = sum(errors.values()) / sum(own.values())
    yield below("bf16 gradients, mean error over Hugging Face's", times, TIMES)


def decoded(bench: Bench) -> Iterator[Figure]:
    """The decoder adds the adapters beside the weights, the training forward pass by a hook."""
    policy = actor(bench, Precision("fp32"))
    rollout = policy.generate(prompts(), Sampling(RESPONSE, seed=5, step=3))
    assert rollout.generation_logprobs is not None
    gap = policy.logprobs(rollout.sequences).logprobs - rollout.generation_logprobs
    yield below(
        "fp32 log-probs of the sampler against the training forward, largest gap",
        float(gap.abs()[rollout.mask].max()),
        FP32,
    )


def shared(bench: Bench) -> Iterator[Figure]:
    """A second role on a base has the first one's tensors."""
    base = Base()
    first, second = (build(bench, Precision("bf16"), base) for _ in range(2))
    places = [
        {p.data_ptr() for chunk in engine.chunks for p in chunk.parameters() if not p.requires_grad}
        for engine in (first, second)
    ]
    yield equal(
        "tensors of a base that two roles share", len(places[0] & places[1]), len(base.held)
    )
