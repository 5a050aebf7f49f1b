"""Degenerate cases of adapters: rank 0, B = 0, full rank; and their gradients from the full
model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.hf_adapters import export_adapters, load_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronRewardModel, outputs
from gipo_megatron.specs import AdapterSpec
from gipo_megatron.weights.checkpoints import CheckpointMeta, read_meta
from tests.parity.roles import digest, engine, fill, new_actor, new_critic, new_reward, parts_of
from tests.parity.tiny import ARCHITECTURE, VOCAB, generator, hf_model, relative_errors
from tools.gpu.tiny_adapters import SPEC, adapter_tensors

pytestmark = pytest.mark.global_rng
NEW = {"text": new_actor, "actor": new_actor, "critic": new_critic, "reward": new_reward}
FEW = AdapterSpec(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "up_proj"), scaling="rslora")
# no matrix has more than 32 of both rows and columns
FULL = AdapterSpec(rank=32, alpha=64.0)
FACTOR = 2.0


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 11), generator=generator(6))


def adapters(role: Any) -> dict[str, Tensor]:
    found = export_adapters(role.engine.chunks, role.engine.mesh, ARCHITECTURE, role.engine.adapter)
    return {name: tensor.clone() for name, tensor in found}


def gradients(role: Any, kind: str) -> dict[str, Tensor]:
    _, bad = role.engine.backward(parts_of(kind, role.engine.mesh), role.readout)
    assert bad == []
    return dict(role.engine.gradients())


@pytest.mark.parametrize("kind", ["actor", "critic", "reward"])
def test_rank_0_is_a_full_run(mesh: Mesh, tmp_path: Path, kind: str) -> None:
    """Whatever the other keys are: the same modules, bits and checkpoint."""
    none = AdapterSpec(rank=0, alpha=7.0, targets=("q_proj",), scaling="rslora")
    found = []
    for name, changes in (("full", {}), ("zero", {"adapter": none})):
        role = NEW[kind](mesh, **changes)
        chunk = role.engine.chunks[0]
        assert role.engine.base is None and all(p.requires_grad for p in chunk.parameters())
        for _ in range(2):
            assert role.update(*parts_of(kind, mesh)).skipped is None
        saved = checkpoint.save(tmp_path / name, {kind: role.engine}, mesh, CheckpointMeta(1))
        modules = [(path, type(module)) for path, module in chunk.named_modules()]
        found.append((modules, digest(role), read_meta(saved).roles))
    assert found[0] == found[1]


def test_the_first_step_moves_b_alone(mesh: Mesh) -> None:
    """The gradient of A is factor · Bᵀ G = 0."""
    for kind in ("actor", "reward"):
        model = engine(kind, mesh, adapter=SPEC)
        role: Any = MegatronRewardModel(model)
        if kind == "actor":
            role = MegatronActor(model, eos_id=1, pad_id=0, decode=str)
        before = adapters(role)
        assert role.update(*parts_of(kind, mesh)).skipped is None
        moved = {name for name, x in adapters(role).items() if not torch.equal(x, before[name])}
        assert moved == {name for name in before if "lora_B" in name} and len(moved) == 4 * 7


@pytest.mark.parametrize("spec", [SPEC, FEW], ids=["all", "few"])
@pytest.mark.parametrize("kind", NEW)
def test_gradients_from_the_full_models(mesh: Mesh, kind: str, spec: AdapterSpec) -> None:
    """dL/dA = factor · Bᵀ G and dL/dB = factor · G Aᵀ, where G is the gradient of the whole matrix
    in a full model with W + factor · B A."""
    adapted, full = NEW[kind](mesh, adapter=spec), NEW[kind](mesh)
    model = hf_model()
    model.load_state_dict(dict(adapted.engine.export()), strict=False)
    found, whole = gradients(adapted, kind), gradients(fill(full, model), kind)
    expected = {"score.weight": whole["score.weight"]} if "score.weight" in whole else {}
    for name, tensor in adapter_tensors(spec).items():
        layer, letter, _ = name.rsplit(".", 2)
        product = (
            whole[f"{layer}.weight"] @ tensor.T
            if letter == "lora_A"
            else tensor.T @ whole[f"{layer}.weight"]
        )
        other = "lora_B" if letter == "lora_A" else "lora_A"
        expected[f"{layer}.{other}.weight"] = spec.factor * product
    errors = relative_errors(found, expected)
    assert max(errors.values()) <= 1e-5, errors
    assert len(errors) == 4 * len(spec.targets) * 2 + (kind in ("critic", "reward"))


def full_rank(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return adapters with factor · B A = the change of each matrix: A orthogonal where the matrix
    has 32 columns, else B, which has 32 rows then; the other one is 0 without a change."""
    found = {}
    for i, (name, whole) in enumerate(changes.items()):
        layer, change = name.removesuffix(".weight"), whole / FACTOR
        q = torch.linalg.qr(torch.randn(32, 32, generator=generator(40 + i))).Q
        a, b = (q, change @ q.T) if change.shape[1] == 32 else (q.T @ change, q)
        found |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    return found


def with_adapters(mesh: Mesh, tensors: dict[str, Tensor]) -> Any:
    role = new_actor(mesh, adapter=FULL)
    load_adapters(tensors, role.engine.chunks, mesh, ARCHITECTURE, FULL)
    role.engine.weights_changed()
    return role


def matrices() -> dict[str, Tensor]:
    weights = hf_model().state_dict()
    return {name: x for name, x in weights.items() if name.endswith("_proj.weight")}


def changed(mesh: Mesh, changes: dict[str, Tensor]) -> Any:
    """Return a full model with other matrices."""
    model = hf_model()
    weights = {name: x + changes[name] for name, x in matrices().items()}
    model.load_state_dict(weights, strict=False)
    return fill(new_actor(mesh), model)


def test_full_rank_makes_the_full_models_step(mesh: Mesh) -> None:
    """Of gradient descent, for any size of the step: one factor is orthogonal, and the other 0, so
    W + factor · B A becomes W - size · factor² · G."""
    start = full_rank({name: torch.zeros_like(x) for name, x in matrices().items()})
    adapted, full, size = with_adapters(mesh, start), new_actor(mesh), 0.5
    assert torch.equal(outputs(adapted.engine, tokens()), outputs(full.engine, tokens()))
    whole = gradients(full, "text")
    step = {name: -size * FACTOR**2 * whole[name] for name in matrices()}
    found = gradients(adapted, "text")
    adapted = with_adapters(mesh, {name: x - size * found[name] for name, x in start.items()})
    new, plain = dict(adapted.engine.export()), dict(full.engine.export())
    made = {name: new[name] - plain[name] for name in step}
    assert len(made) == 4 * 7 and max(relative_errors(made, step).values()) <= 1e-4
    ours, theirs = (outputs(role.engine, tokens()) for role in (adapted, changed(mesh, step)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float((ours - outputs(full.engine, tokens())).abs().max()) > 0.1


def test_full_rank_has_the_function_of_a_full_update(mesh: Mesh) -> None:
    """Of the optimizer's own, in the matrices that have adapters."""
    full = new_actor(mesh)
    for _ in range(2):
        assert full.update(*parts_of("actor", mesh)).skipped is None
    new = dict(full.engine.export())
    change = {name: new[name] - x for name, x in matrices().items()}
    ours, theirs, before = (
        outputs(role.engine, tokens())
        for role in (with_adapters(mesh, full_rank(change)), changed(mesh, change), new_actor(mesh))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float((ours - before).abs().max()) > 1e-2
