"""tools/benchmark.py peers and growth at small sizes: rows and figures by hand, our side in this
process, one cell against TRL."""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gipo_megatron.errors import UserError
from tools import benchmark_adapters as adapters
from tools import benchmark_growth as growth
from tools import benchmark_peers as peers
from tools.benchmark_peers_ours import Ours
from tools.benchmark_peers_rows import FIRST_ID, MODELS, Cell, batch_of, cells
from tools.gpu.tiny import hf_model

TINY = MODELS["tiny"]


class Inline:
    """benchmark_worker.Worker without a process, so its memory is made up."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self.served = make(*arguments)

    def ready(self) -> None: ...

    def __call__(self, method: str, *arguments: Any) -> Any:
        return 7 * 2**20 if method == "grown" else getattr(self.served, method)(*arguments)

    def close(self) -> None:
        self.served.side.close()


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_rows_are_the_same_in_every_process_and_as_a_cell_describes_them(model: Any) -> None:
    for cell in cells(model):
        rows = batch_of(cell, 3)
        assert rows == batch_of(cell, 3) != batch_of(cell, 4)
        assert len(rows) == cell.samples
        ids = {i for row in rows for i in row.prompt + row.chosen + row.rejected}
        assert min(ids) >= FIRST_ID and max(ids) < model.architecture.vocab_size
        lengths = [len(row.prompt + row.chosen) for row in rows]
        assert max(lengths) <= model.longest
        assert (len(set(lengths)) == 1) == cell.equal
        prompts = [1 if cell.task == "sft" and not cell.masked else n // 2 for n in lengths]
        assert [len(row.prompt) for row in rows] == prompts


@pytest.mark.parametrize(("task", "loss"), [("sft", math.log(512)), ("rm", math.log(2))])
def test_our_side_trains(task: str, loss: float) -> None:
    """Random weights predict every token and every preference alike; the loss of a batch that is
    seen again is lower."""
    cell = Cell(TINY, task)
    side = Ours(cell, "")
    side.collate(batch_of(cell, 0))
    first, *_, last = [side.step() for _ in range(4)]
    assert first == pytest.approx(loss, rel=0.02)
    assert last < first
    side.close()


def test_ratios_and_differences_by_hand() -> None:
    found = peers.Found(
        {"ours": [1.0, 2.0, 4.0], "trl": [2.0, 3.0, 12.0]},
        {"ours": [0.5, 10.0], "trl": [0.5004, 10.03]},
        {"ours": 3 * 2**20, "trl": 5 * 2**20},
    )
    assert found.ratios == [2.0, 1.5, 3.0]
    assert found.difference == pytest.approx(0.003, rel=0.01)
    line = found.line(Cell(TINY, "sft"))
    assert line == ["SFT", "4", "2.67", "**2.00** (1.50 to 3.00)", "3", "5", "3e-03"]
    with pytest.raises(RuntimeError, match=r"differ by 3\.0e-03, which is no comparison"):
        found.check(Cell(TINY, "sft"))


def test_exponents_of_powers() -> None:
    assert growth.exponent([1, 2, 8], [3, 3 * 2**1.5, 3 * 8**1.5]) == pytest.approx(1.5)
    assert growth.exponent([16, 32], [7, 7]) == pytest.approx(0)


def test_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "Worker", Inline)
    monkeypatch.setattr(growth, "prepare", lambda threads: None)
    out = tmp_path / "growth.svg"
    growth.run_growth(Namespace(tiny=True, rounds=1, threads=1, out=str(out)))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| vocabulary |")]) == 3
    assert len([line for line in lines if line.startswith("|")]) == 2 + 8 + 2 + 4
    assert len([line for line in lines if line.endswith("| 7 |")]) == 8
    assert len([line for line in lines if line.endswith("0.00 |")]) == 4
    text = ElementTree.parse(out).getroot().itertext()
    assert {"seconds", "memory", "1,024"} <= {word.strip() for word in text}


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        peers.smollm(Namespace(smollm=str(tmp_path)))
    assert peers.smollm(Namespace(smollm=None)) is None


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="needs TRL: pip install -e '.[dev]'"
)
def test_a_cell_against_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses in two steps."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setenv(name, value)
    cell = Cell(TINY, "dpo")
    with peers.weights_of(TINY, None) as folder:
        found = peers.compare(cell, folder, 1)
    assert [len(found.losses[side]) for side in peers.SIDES] == [2, 2]
    assert 0.3 < found.losses["trl"][0] < 3 and found.difference < 1e-5
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found.seconds.values())
    assert all(size > 0 for size in found.peaks.values())


def test_adapters_beside_the_weights_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each rank and number of rows; the ratio is that of the two speeds."""
    hf_model().save_pretrained(tmp_path)
    shape = {"ranks": [1, 4], "rows": [2], "prompt": 4, "response": 5, "repeats": 1}
    adapters.run_adapters(Namespace(smollm=str(tmp_path), dtype="fp32", **shape))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [line for line in lines if line and line[0] in "14"]
    assert [row[:2] for row in table] == [["1", "2"], ["4", "2"]]
    for _, _, merged, unmerged, ratio, *_ in table:
        assert float(ratio) == pytest.approx(float(unmerged) / float(merged), abs=1e-2)
