"""Adapters at every layout of two processes against plain torch, and against one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import adapter_cases
from tests.parity.launch import ranks
from tests.parity.matrix import BF16_CHECKPOINTS, LAYOUTS

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """(layout, rank) -> what it found; one process is ("single", 0)."""
    found = {("single", 0): adapter_cases.run(1, tmp_path_factory.mktemp("one"))["single"]}
    for rank, results in enumerate(ranks(2, tmp_path_factory)[1]):
        found |= {(layout, rank): cell for layout, cell in results["adapters"].items()}
    assert len(found) == 1 + 2 * len(LAYOUTS[2]) == 11
    return found


def test_gradients(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Also where activations are computed again."""
    for place, cell in cells.items():
        assert cell["gradients"].keys() == adapter_cases.VARIANTS.keys()
        for variant, errors in cell["gradients"].items():
            assert len(errors) == 4 * 7 * 2 + (variant == "reward")
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] <= 1e-5, (place, variant, worst, errors[worst])


def test_pages(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    """The real PPO and DPO pages: actor, critic with its heads, labels, and pairs."""
    checked = 0
    for (layout, rank), cell in cells.items():
        heads = {"actor": 0, "critic": 1 if layout.startswith("pp2") and rank == 0 else 3}
        groups = cell["pages"]["groups"]
        assert len(groups) == 4 and max(groups.values()) <= 1e-6, (layout, rank, groups)
        for page in ("actor", "critic", "sigmoid"):
            errors = cell["pages"][page]
            assert len(errors) == 4 * 7 * 2 + heads.get(page, 1)
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] <= 1e-5, (layout, rank, page, worst, errors[worst])
            checked += 1
    assert checked == 11 * 3


def test_an_update_changes_its_own_role_alone(
    cells: dict[tuple[str, int], dict[str, Any]],
) -> None:
    for place, cell in cells.items():
        assert cell["untouched"] == {"actor": ["actor"], "critic": ["critic"]}, place


def test_export_adds_the_adapters(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert all(cell["exported"] <= 1e-6 for cell in cells.values())


def test_a_run_writes_pefts_folder(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert all(cell["written"] for cell in cells.values())


def test_decoding_uses_the_adapters(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    expected = cells["single", 0]["decoded"]["tokens"]
    checked = 0
    for place, cell in cells.items():
        assert cell["decoded"]["error"] <= 1e-5, place
        for row, tokens in cell["decoded"]["tokens"].items():
            assert tokens == expected[int(row)], place
            checked += 1
    assert checked == 4 + 2 * (4 * 4 + 2)  # two replicas have two rows each


def test_first_values_do_not_depend_on_the_layout(
    cells: dict[tuple[str, int], dict[str, Any]],
) -> None:
    assert len({cell["initial"] for cell in cells.values()}) == 1


def test_updates_do_not_depend_on_the_layout(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    for place, cell in cells.items():
        assert len(cell["steps"]) == 2
        assert cell["steps"] == pytest.approx(cells["single", 0]["steps"], rel=1e-4), place


def test_a_shared_base_changes_no_bit(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert all(cell["shared"] == [True, True] for cell in cells.values())


def test_a_whole_checkpoint_is_a_base(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert all(cell["on_a_checkpoint"] for cell in cells.values())


def test_a_checkpoint_is_resumed_at_every_layout(
    cells: dict[tuple[str, int], dict[str, Any]],
) -> None:
    """Bit for bit at the layout that wrote it."""
    for (layout, rank), cell in cells.items():
        whole, again = cell["whole"], cell["resumed"]
        assert len(whole["norms"]) == 4 and again["steps"] == [3, 3]
        assert again["norms"] == pytest.approx(whole["norms"], rel=1e-4), (layout, rank)
        if layout in ("single", "tp2"):
            assert (again["norms"], again["digests"]) == (whole["norms"], whole["digests"])


def test_a_bf16_run_is_resumed_bit_for_bit(cells: dict[tuple[str, int], dict[str, Any]]) -> None:
    """From the optimizer's fp32 masters."""
    found = [cell["bf16"] for cell in cells.values() if "bf16" in cell]
    for whole, again in found:
        assert len(whole["norms"]) == 4
        assert (again["norms"], again["digests"]) == (whole["norms"], whole["digests"])
    assert len(found) == 2 * len(BF16_CHECKPOINTS)
