"""Roles on one frozen base: its memory is there once, and no role changes another's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import build as building
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.meta_shard import num_bytes
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic, outputs
from gipo_megatron.specs import AdapterSpec, Precision
from gipo_megatron.weights.base import BaseMeta
from gipo_megatron.weights.checkpoints import CheckpointMeta, read_meta
from tests.parity.roles import ADAM, parts_of
from tests.parity.tiny import ARCHITECTURE, VOCAB, generator, hf_model
from tools.gpu.tiny_adapters import SPEC

pytestmark = pytest.mark.global_rng
ROLES = {"actor": ADAM, "critic": ADAM, "reward": None, "reference": None}


def build(role: str, mesh: Mesh, base: Base | None, **changes: Any) -> Engine:
    """The reference is the base itself, without adapters."""
    adapter = AdapterSpec() if role == "reference" else SPEC
    kept = {"adapter": adapter, "optimisation": ROLES[role], "seed": 3}
    return build_engine(
        role, mesh, ARCHITECTURE, Precision("fp32"), base=base, **{**kept, **changes}
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 11), generator=generator(6))


@pytest.mark.parametrize("order", [tuple(ROLES), tuple(ROLES)[::-1], ("critic", "actor")])
def test_a_base_is_in_memory_once(mesh: Mesh, order: tuple[str, ...]) -> None:
    base = Base()
    engines = {role: build(role, mesh, base) for role in order}
    weights = [p for e in engines.values() for p in e.chunks[0].parameters()]
    # embedding and output layer; each layer: query, key, value, projection, three MLP matrices and
    # two norms; the last norm
    shared = 2 * 256 * 32 + 4 * (64 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32) + 32
    adapters = 4 * 3 * 464  # tests/megatron/test_adapters.py
    # in mcore's buffer a trained role's parameters are padded
    own = {role: num_bytes(e._weights()) for role, e in engines.items()}
    assert num_bytes(weights) == 4 * shared + sum(own.values())
    for role, size in own.items():
        least = 0 if role == "reference" else 4 * (adapters + 32 * (role in ("critic", "reward")))
        assert least <= size <= least + (4 * 64 * 57 + 512 if ROLES[role] else 0), role
    assert base.filled == base.held.keys() and len(base.held) == 3 + 4 * 6


def test_a_shared_base_changes_no_bit(mesh: Mesh) -> None:
    """Two updates of actor and critic, against models with weights of their own."""
    found = []
    for base in (Base(), None):
        engines = {role: build(role, mesh, base) for role in ROLES}
        actor = MegatronActor(engines["actor"], eos_id=1, pad_id=0, decode=str)
        before = outputs(engines["reference"], tokens())
        for _ in range(2):
            for kind, role in (("actor", actor), ("critic", MegatronCritic(engines["critic"]))):
                assert role.update(*parts_of(kind, mesh)).skipped is None
        found.append({role: outputs(engine, tokens()) for role, engine in engines.items()})
        assert torch.equal(before, found[-1]["reference"])
        assert not torch.equal(before, found[-1]["actor"])
    for role in ROLES:
        assert torch.equal(found[0][role], found[1][role]), role


def test_a_folder_is_read_once(mesh: Mesh, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path)
    base, read = Base(), dict[str, list[str]]()
    for role in ("critic", "actor", "reference"):
        names = read.setdefault(role, [])
        engine = build(
            role, mesh, base, load=str(tmp_path), seen=lambda name, _, to=names: to.append(name)
        )
    assert [len(names) for names in read.values()] == [2 + 4 * 6, 1, 0]
    assert read["actor"] == ["output_layer.weight"]
    with torch.no_grad():
        expected = hf_model()(tokens()).logits
    torch.testing.assert_close(outputs(engine, tokens()), expected, atol=1e-5, rtol=1e-5)


def save(engines: dict[str, Engine], mesh: Mesh, folder: Path) -> Path:
    return checkpoint.save(folder, engines, mesh, CheckpointMeta(1))


def test_a_checkpoint_has_adapters_and_head_alone(mesh: Mesh, tmp_path: Path) -> None:
    base = Base()
    engines = {role: build(role, mesh, base) for role in ("actor", "critic")}
    saved = save(engines, mesh, tmp_path)
    for role, head in (("actor", set()), ("critic", {"score.weight"})):
        stored = torch_checkpoint.FileSystemReader(saved / role).read_metadata()
        names = {n for n in stored.state_dict_metadata if not n.startswith("optimizer")}
        kinds = {n for n in names if ".adapter." in n}
        assert len(kinds) == 4 * 4 * 2 and names == kinds | head
    about = read_meta(saved).roles["actor"]
    assert (about.adapter, about.base) == (SPEC, BaseMeta("random/3"))


def test_the_next_stage_continues_on_the_same_base(mesh: Mesh, tmp_path: Path) -> None:
    """A trained actor's adapters start a reward model and a critic; the base is read from where it
    was, once."""
    hf_model().save_pretrained(tmp_path / "hf")
    first = build("actor", mesh, None, load=str(tmp_path / "hf"))
    actor = MegatronActor(first, eos_id=1, pad_id=0, decode=str)
    actor.update(*parts_of("actor", mesh))
    saved = save({"actor": first}, mesh, tmp_path)
    base = Base()
    again, critic = (build(role, mesh, base, load=str(saved)) for role in ("actor", "critic"))
    assert torch.equal(outputs(again, tokens()), outputs(first, tokens()))
    weights = [dict(engine.chunks[0].named_parameters()) for engine in (again, critic)]
    name = "decoder.layers.1.mlp.linear_fc1"
    assert weights[0][f"{name}.weight"] is weights[1][f"{name}.weight"]
    for matrix in "ab":
        values = [w[f"{name}.adapter.{matrix}"] for w in weights]
        assert values[0] is not values[1] and torch.equal(*values)
    assert weights[1][f"{name}.adapter.b"].any()


def test_adapters_without_their_base(mesh: Mesh, tmp_path: Path) -> None:
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    saved = save({"actor": build("actor", mesh, None, load=str(tmp_path / "hf"))}, mesh, tmp_path)
    for spec, base in ((AdapterSpec(rank=2), None), (AdapterSpec(), Base()), (AdapterSpec(), None)):
        with pytest.raises(UserError, match="has other adapters: there AdapterSpec"):
            build("reference", mesh, base, load=str(saved), adapter=spec)
    with pytest.raises(UserError, match="its base is another model"):
        base = Base()
        build("critic", mesh, base)
        build("actor", mesh, base, load=str(saved))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="has changed since"):
        build("actor", mesh, None, load=str(saved))
    (tmp_path / "hf").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"is not at {tmp_path}/hf, or"):
        build("actor", mesh, None, load=str(saved))


def test_a_whole_checkpoint_is_a_base(mesh: Mesh, tmp_path: Path) -> None:
    whole = build("actor", mesh, None, adapter=AdapterSpec())
    saved, base = save({"actor": whole}, mesh, tmp_path), Base()
    for role in ("critic", "actor", "reference"):  # the critic's has no output layer
        engine = build(role, mesh, base, load=str(saved))
        assert base.filled == base.held.keys()
    assert torch.equal(outputs(engine, tokens()), outputs(whole, tokens()))
    assert base.meta is not None and base.meta.source == str(saved / "actor")


def test_a_run_without_adapters_reads_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read pieces of every file of a model at each start."""
    monkeypatch.setattr(building, "base_at", lambda folder: pytest.fail(f"read {folder}"))
    monkeypatch.setattr(building, "weights_kind", lambda folder: "huggingface")
    bases = building.Bases()
    alone = {"adapter": AdapterSpec(), "base": None}
    assert bases.settings("actor", "model", AdapterSpec()) == alone
    assert bases.settings("reward", "model") == alone  # not trained
