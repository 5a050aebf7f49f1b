"""Planned and allocated bytes of weights, gradients and optimizer state are equal, rank by rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import planning_cases
from tests.parity.launch import ranks
from tests.parity.matrix import LAYOUTS

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
# layouts × ranks × (two number formats of 4 roles, and one with adapters, and their base)
CELLS = {1: 13, 2: 130, 4: 156}


@pytest.mark.parametrize("world", LAYOUTS)
def test_predicted_bytes_are_the_allocated_ones(
    layouts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, world: int
) -> None:
    found = (
        [planning_cases.run(1)]
        if world == 1
        else [rank["allocated"] for rank in ranks(world, tmp_path_factory)[1]]
    )
    checked = 0
    for rank, cells in enumerate(found):
        for cell, roles in cells.items():
            predicted = layouts[f"{world}/{cell}/{rank}"]
            if "base" in roles:
                base, _, _ = roles.pop("base")
                assert base == max(shard["base"] for shard in predicted.values()) > 0
                checked += 1
            for role, sizes in roles.items():
                shard = predicted[role]
                assert [shard["weights"], shard["gradients"], shard["optimizer"]] == sizes, (
                    f"{cell} rank {rank} {role}"
                )
                assert sizes[0] > 0 and bool(sizes[1]) == bool(sizes[2]) == (
                    role in ("actor", "critic")
                )
                checked += 1
    assert checked == CELLS[world]
