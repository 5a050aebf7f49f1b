"""The chain by adapters on a model of random weights, at other layouts, too; test_lora.py has more
of it on a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.specs import AdapterSpec
from gipo_megatron.weights.checkpoints import RoleMeta, read_meta
from tests.runs.chain import close, rows

pytestmark = pytest.mark.multiprocess
STAGES = {
    "lora_sft": ("actor",),
    "lora_rm": ("reward",),
    "lora_gipo": ("actor", "critic"),
}


def roles(run: Path) -> dict[str, RoleMeta]:
    return read_meta(run / "final").roles


def test_all_stages_have_one_base(base: Path) -> None:
    bases = set()
    for stage, names in STAGES.items():
        found = roles(base / stage)
        assert set(found) == set(names)
        for role in found.values():
            assert role.adapter == AdapterSpec(rank=4)
            bases.add(role.base)
    (one,) = bases
    assert one is not None and one.seed is not None


def test_the_policy_starts_at_its_reference(base: Path) -> None:
    """Both have the adapters of the SFT run: no KL, to the last bit, before the first update,
    in step 2."""
    run = rows(base / "lora_gipo")
    assert run[1]["kl/mean"] == run[2]["kl/mean"] == 0.0 != run[3]["kl/mean"]


@pytest.mark.parametrize("name", ["lora_pp2_vpp2", "lora_dp2_then_tp2_sp"])
def test_layouts_of_two_processes(base: Path, two: Path, name: str) -> None:
    """Also where the layout changes after step 2."""
    alone, there = rows(base / "lora_gipo"), rows(two / name)
    assert [row["step"] for row in there] == [0, 1, 2, 3]
    for step in (1, 3):
        mine, its = alone[step], there[step]
        assert len(mine) > 60 and mine.keys() == its.keys()
        assert {k: (mine[k], its[k]) for k in mine if not close(mine[k], its[k], 1e-3)} == {}
    assert roles(two / name) == roles(base / "lora_gipo")
