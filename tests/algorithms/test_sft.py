"""SFT's loss against torch's cross entropy; one step is one update."""

from __future__ import annotations

import contextlib

import pytest
import torch

from gipo_megatron.algorithms.sft import SFT
from gipo_megatron.local.roles import TorchActor
from gipo_megatron.types import Sequences


def rows() -> Sequences:
    lengths = torch.tensor([4, 3, 5])
    position = torch.arange(5)
    tokens = torch.randint(1, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    return Sequences(
        tokens,
        (position >= 2) & (position < lengths[:, None]),
        torch.full((3,), 2),
        lengths,
        torch.arange(3),
    )


def test_loss_is_torchs_cross_entropy() -> None:
    batch, actor = rows(), TorchActor(9, hidden=8, init_std=0.5)
    sft = SFT(actor=actor, examples=lambda step: batch, timer=lambda name: contextlib.nullcontext())
    expected = torch.nn.functional.cross_entropy(
        actor.logits(batch.tokens)[batch.mask], batch.tokens[batch.mask], reduction="sum"
    ).detach()
    loss = sft.loss(actor.logprobs(batch), batch)
    total, unit = loss.terms["nll"]
    assert unit == "token"
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert loss.metrics["loss"].result() == pytest.approx(float(expected) / 6, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_step_does_not_depend_on_micro_batches(micro_batch: int) -> None:
    """Gradients, not weights after Adam: Adam hides a factor."""
    batch, gradients = rows(), []
    for size in (0, micro_batch):
        actor = TorchActor(9, hidden=8, init_std=0.5, micro_batch=size)
        sft = SFT(
            actor=actor, examples=lambda step: batch, timer=lambda name: contextlib.nullcontext()
        )
        actor._stepper.step = lambda dp, a=actor: (
            gradients.append([p.grad.clone() for p in a.parameters]) or 0.0
        )  # type: ignore[method-assign, union-attr, misc]
        metrics = sft.step(0).metrics
        assert metrics.keys() == {"sft/loss", "sft/grad_norm"}
    assert len(gradients) == 2
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_loss_falls() -> None:
    batch = rows()
    sft = SFT(
        actor=TorchActor(9, hidden=8, lr=0.05),
        examples=lambda step: batch,
        timer=lambda name: contextlib.nullcontext(),
    )
    losses = [sft.step(step).metrics["sft/loss"].result() for step in range(20)]
    assert losses[-1] < 0.5 * losses[0]
