"""The learning rate by hand; mcore's optimizer against torch's AdamW and clip_grad_norm_ on Hugging
Face's model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.optimizer import LearningRate, clipped_step, gradient_norm
from gipo_megatron.specs import Optimisation, Precision
from tests.parity.roles import new_actor
from tests.parity.tiny import hf_model, hf_token_stats, language_loss, pretraining, relative_errors
from tests.watch import Reads


def rates(optimisation: Optimisation, num: int) -> list[float]:
    rate = LearningRate(optimisation)
    seen = []
    for _ in range(num):
        seen.append(rate.value)
        rate.steps += 1
    return seen


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (
            "cosine",
            [
                0.5,
                1.0,
                1.0,
                0.1 + 0.9 * (1 + 2**-0.5) / 2,
                0.55,
                0.1 + 0.9 * (1 - 2**-0.5) / 2,
                0.1,
                0.1,
            ],
        ),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    # two warm-up steps at 1/2 and 1, then four steps of decay
    found = rates(
        Optimisation(lr=1.0, schedule=schedule, warmup_steps=2, total_steps=6), len(expected)
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_learning_rate_state() -> None:
    rate = LearningRate(Optimisation(lr=2.0, schedule="linear", total_steps=4))
    rate.load_state_dict({"steps": 3})
    assert rate.value == 0.5 and rate.state_dict() == {"steps": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        Optimisation(1.0, schedule="step"),
        Optimisation(1.0, schedule="cosine", warmup_steps=5, total_steps=5),
    ],
)
def test_learning_rate_mistakes(wrong: Optimisation) -> None:
    with pytest.raises(ValueError, match="schedule"):
        LearningRate(wrong)


@pytest.mark.global_rng
def test_three_steps_are_adamw(mesh: Mesh) -> None:
    optimisation = Optimisation(
        lr=1e-3, warmup_steps=2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_grad=0.5
    )
    actor = new_actor(mesh, optimisation=optimisation)
    model, rows = hf_model(), pretraining()
    norms_too = [p for p in model.parameters() if p.dim() > 1]
    # mcore's rule: nothing one-dimensional decays
    flat = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": norms_too, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for lr in (5e-4, 1e-3, 1e-3):
        update = actor.update((rows, language_loss))
        adam.zero_grad()
        (
            language_loss(hf_token_stats(model, rows), rows).terms["ptx"][0] / rows.mask.sum()
        ).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        assert update.metrics["learning_rate"].result() == lr
        assert update.metrics["grad_norm"].result() == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.5  # or the clip is not tested
    moved = {name: tensor - start[name] for name, tensor in actor.export_weights()}
    theirs = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    errors = relative_errors(moved, theirs)
    # Adam's first steps are signs: rounding where g is near 0
    assert len(errors) == 39 and max(errors.values()) < 1e-3, errors


@pytest.mark.global_rng
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norm_and_clip_are_mcores_bit_by_bit(mesh: Mesh, dtype: str) -> None:
    """The norm with one value read, though the model has 39 parameters; the clip with none."""
    optimisation = Optimisation(lr=0.0)
    actor = new_actor(mesh, precision=Precision(dtype), optimisation=optimisation)
    actor.engine.backward([(pretraining(), language_loss)], actor.readout)
    optimizer = actor.engine.optimizer
    with Reads() as reads:
        norm = gradient_norm(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert reads.count == 1 < len(parameters)
    before = [p.grad.clone() for p in parameters]
    with cpu_compat.host_mode():
        assert norm == optimizer.get_grad_norm()
        clip_grad_by_total_norm_fp32(parameters, norm / 2, norm)
    theirs = [p.grad.clone() for p in parameters]
    for p, grad in zip(parameters, before, strict=True):
        p.grad.copy_(grad)
    with Reads() as reads:
        clipped_step(optimizer, norm, replace(optimisation, clip_grad=norm / 2), lr=0.0)
    assert reads.count == 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, theirs, strict=True))
    assert not all(map(torch.equal, before, theirs))


@pytest.mark.global_rng
def test_one_replica_sends_nothing(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchange with no other rank would copy a whole buffer."""
    actor = new_actor(mesh, optimisation=Optimisation(lr=1e-3))
    sent: list[str] = []
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        monkeypatch.setattr(
            param_and_grad_buffer, name, lambda *_, name=name, **__: sent.append(name)
        )
    before = {name: tensor.clone() for name, tensor in actor.export_weights()}
    update = actor.update((pretraining(), language_loss))
    assert update.metrics["grad_norm"].result() > 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in actor.export_weights())
    assert sent == []
