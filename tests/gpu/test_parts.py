"""Every part of tools/gpu_verify.py, in this process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import time
from dataclasses import asdict

import pytest

from tools.gpu.bench import Bench, NotRun
from tools.gpu_verify import PARTS, Part


@pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])
def test_all_figures_are_within_their_targets(bench: Bench, part: Part) -> None:
    if part.te and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    module, function = part.run.split(":")
    bench.deadline, found = time.monotonic() + 600, []
    try:
        for figure in getattr(importlib.import_module(module), function)(bench):
            print(json.dumps(asdict(figure), ensure_ascii=False))
            found.append(figure)
    except NotRun as reason:
        pytest.skip(str(reason))
    finally:
        bench.deadline = math.inf
        rest = list(bench.free())
    assert found and [figure for figure in (*found, *rest) if figure.ok is False] == []
