"""Part `fusion`: the fused kernels that layers have without Transformer Engine, one by one, and the
time that each saves in a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gipo_megatron.megatron import fusions
from gipo_megatron.megatron.model import rope_frequencies
from gipo_megatron.megatron.precision import transformer_engine_usable
from gipo_megatron.megatron.roles import MegatronActor
from tools.gpu.bench import Bench, Figure, below, figure, true
from tools.gpu.models import SEVEN_B, random_text, shape, supervised, trained_actor
from tools.gpu.plans import step

LAYERS = 4
EXACT = 1e-5  # fp32 sums of bf16 products, in another order
CLOSE = 1e-2  # bf16: the compiled function rounds once, torch after each operation
ROTATES = 2.0  # times as fast as uncompiled, at least


def fusion(bench: Bench) -> Iterator[Figure]:
    yield from weight_gradient(bench)
    yield from rotation(bench)
    yield from residual_and_norm(bench)
    yield from in_a_layer(bench)


def normal(bench: Bench, *size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    g = torch.Generator(bench.device).manual_seed(seed)
    return torch.randn(*size, device=bench.device, generator=g).to(dtype)


# --------------------------------------------------------------------------------- weight gradients


def weight_gradient(bench: Bench) -> Iterator[Figure]:
    """total += gᵀ x twice, in place, against a product in double; then the four matrices of a 7B
    layer, fused and in two passes."""
    if bench.cuda and torch.__version__ < fusions.TORCH:
        yield figure("weight gradients", f"in two passes: torch is older than {fusions.TORCH}")
        return
    rows, wide = (64, 48) if bench.tiny else (2048, 1024)
    x, g = normal(bench, rows, wide), normal(bench, rows, 2 * wide, seed=1)
    total = normal(bench, 2 * wide, wide, dtype=torch.float32, seed=2)
    expected = total.double() + 2 * (g.double().t() @ x.double())
    place = total.data_ptr()
    for _ in range(2):
        fusions.add_weight_gradient(x, g, total)
    error = float((total - expected).norm() / expected.norm())
    yield below("weight gradients added twice, relative error", error, EXACT)
    yield true("the sum stays in its place", total.data_ptr() == place)
    a, tokens = shape(SEVEN_B, bench.tiny), 64 if bench.tiny else 8192
    times = [0.0, 0.0]
    for outputs, inputs in (
        ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, a.hidden_size),
        (a.hidden_size, a.num_heads * a.head_dim),
        (2 * a.ffn_hidden_size, a.hidden_size),
        (a.hidden_size, a.ffn_hidden_size),
    ):
        x, g = normal(bench, tokens, inputs), normal(bench, tokens, outputs, seed=1)
        total = torch.zeros(outputs, inputs, device=bench.device)
        for i, add in enumerate((fusions.add_weight_gradient, two_passes)):
            times[i] += bench.seconds(partial(add, x, g, total), unmeasured=3)
    yield figure("weight gradients of a layer, ms", 1000 * times[0])
    yield bench.fast("weight gradients, times as fast as in two passes", times[1] / times[0], 1.0)


def two_passes(x: Tensor, g: Tensor, total: Tensor) -> None:
    """As Megatron-Core without the extension."""
    total.add_(g.t().matmul(x))


# ---------------------------------------------------------------------------- compiled and not


def forward_and_backward(
    bench: Bench, call: Callable[..., tuple[Tensor, ...]], *x: Tensor
) -> float:
    """Seconds."""
    x = tuple(t.detach().requires_grad_() for t in x)
    gradients = tuple(torch.ones_like(t) for t in call(*x))

    def once() -> None:
        torch.autograd.grad(call(*x), x, gradients)

    return bench.seconds(once, unmeasured=3)


def rotation(bench: Bench) -> Iterator[Figure]:
    """RoPE of 7B's queries and keys, 4 × 2048. A pass without gradients is compiled too; another
    length needs no compilation."""
    a = shape(SEVEN_B, bench.tiny)
    rows, length = (2, 32) if bench.tiny else (4, 2048)
    turn = fusions.Rotation(rope_frequencies(a))
    size = length, rows, a.num_heads, a.head_dim
    q, k = normal(bench, *size), normal(bench, *size, seed=1)
    start = bench.now()
    compiled = forward_and_backward(bench, turn, q, k)
    yield figure("RoPE: seconds to compile", bench.now() - start)
    with uncompiled_rotation():
        expected = turn(q.float(), k.float())
        plain = forward_and_backward(bench, turn, q, k)
    start = bench.now()
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(turn(q, k), expected, strict=True)]
    yield figure("RoPE: seconds to compile without gradients", bench.now() - start)
    yield below("RoPE, relative error against fp32", max(errors), CLOSE)
    start = bench.now()
    forward_and_backward(bench, turn, q[: length // 2], k[: length // 2])
    yield figure("RoPE: seconds for another length", bench.now() - start)
    yield figure("RoPE forward and backward, ms", 1000 * compiled)
    yield bench.fast("RoPE, times as fast as uncompiled", plain / compiled, ROTATES)


@contextmanager
def uncompiled_rotation() -> Iterator[None]:
    with patch.object(fusions, "rotate", fusions.rotate_uncompiled):
        yield


def residual_and_norm(bench: Bench) -> Iterator[Figure]:
    """A sum and the RMSNorm after it, which a layer has twice and does not fuse: separate, and in
    one compiled function."""
    a, tokens = shape(SEVEN_B, bench.tiny), 64 if bench.tiny else 8192
    x, residual = (normal(bench, tokens, a.hidden_size, seed=i) for i in (0, 1))
    weight = torch.ones(a.hidden_size, device=bench.device, dtype=torch.bfloat16)

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, a.norm_eps)

    plain = forward_and_backward(bench, add_and_norm, x, residual, weight)
    yield figure("sum and norm forward and backward, ms", 1000 * plain)
    if bench.cuda:  # a CPU needs a compiler of C++ for it
        one = torch.compile(add_and_norm, dynamic=True)
        compiled = forward_and_backward(bench, one, x, residual, weight)
        yield figure("sum and norm, compiled, ms", 1000 * compiled)


# -------------------------------------------------------------------------------------- in a layer


def in_a_layer(bench: Bench) -> Iterator[Figure]:
    """An update of a 4-layer 7B with all, without one, without the other: the difference for each
    layer and micro-batch of 4 × 2048 tokens."""
    if transformer_engine_usable():
        yield figure("in a layer", "Transformer Engine's layers have fused kernels of their own")
        return
    one = step(SEVEN_B, bench.tiny, LAYERS)
    actor, rows = trained_actor(bench.mesh, one), random_text(one)
    passes = one.architecture.num_layers * one.rows // one.micro_batch

    def seconds() -> float:
        return bench.seconds(lambda: actor.update((rows, supervised)), 3, 2) / passes

    together = seconds()
    yield figure("update with all, ms a layer and micro-batch", 1000 * together)
    with uncompiled_rotation():
        yield figure("compiled RoPE saves, ms", 1000 * (seconds() - together))
    with separate_weight_gradients(actor):
        yield figure("fused weight gradients save, ms", 1000 * (seconds() - together))


@contextmanager
def separate_weight_gradients(actor: MegatronActor) -> Iterator[None]:
    """Linear layers read the switch in every pass."""
    switch = "gradient_accumulation_fusion"
    linear = [m for chunk in actor.engine.chunks for m in chunk.modules() if hasattr(m, switch)]
    assert linear, "no layer has the switch: what is measured is the same twice"
    before = [getattr(m, switch) for m in linear]
    for m in linear:
        setattr(m, switch, False)
    try:
        yield
    finally:
        for m, value in zip(linear, before, strict=True):
            setattr(m, switch, value)
