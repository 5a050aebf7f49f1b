"""The results of the two-process checks, for all tests here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.launch import ranks


@pytest.fixture(scope="session")
def model_cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found (tests/parity/model_cases.py)."""
    return [found["model"] for found in ranks(2, tmp_path_factory)[1]]
