from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.reports.synthetic import write_rows
from tools.compare_runs import main

ROWS = [
    {
        "step": s,
        "time/rollout": 0.1 * s,
        "perf/mfu": 0.3,
        "memory/peak_gib": 1.0,
        "kl/mean": 0.1 * s,
        "policy/loss": None,
    }
    for s in (1, 2, 3)
]


def pair(tmp_path: Path, b: list[dict], a: list[dict] = ROWS) -> list[str]:
    for name, rows in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", rows)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def changed(step: int, **values: object) -> list[dict]:
    renamed = {k.replace("__", "/"): v for k, v in values.items()}
    return [row | (renamed if row["step"] == step else {}) for row in ROWS]


def test_time_is_no_difference_and_row_order_neither(tmp_path: Path, capsys) -> None:
    slower = [
        {**row, "time/rollout": 9.0, "perf/mfu": 0.1, "memory/peak_gib": 2.0, "time/extra": 1.0}
        for row in reversed(ROWS)
    ]
    assert main([*pair(tmp_path, slower), "--assert-equal"]) == 0
    out = capsys.readouterr().out
    assert "6 numbers compared, 0 differ" in out and "equal, bit for bit" in out


def test_one_bit_is_named(tmp_path: Path, capsys) -> None:
    folders = pair(tmp_path, changed(2, kl__mean=math.nextafter(0.2, 1)))
    assert main(folders) == 0  # only asked to show
    assert main([*folders, "--assert-equal"]) == 1
    captured = capsys.readouterr()
    assert "DIFFER first at step 2, kl/mean: 0.2 and 0.20000000000000004" in captured.err
    assert "kl/mean" in captured.out and "relative" in captured.out
    assert main([*folders, "--tolerance", "1e-12"]) == 0
    assert main([*folders, "--tolerance", "0"]) == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (changed(1, kl__mean=None), "step 1, kl/mean: 0.1 and None"),
        (changed(3, policy__loss=0.0), "step 3, policy/loss: None and 0.0"),
        (ROWS[:2], "step 3, (the whole row): there and absent"),
        ([*ROWS, {"step": 4, "kl/mean": 1.0}], "step 4, (the whole row): absent and there"),
        (
            [{k: v for k, v in row.items() if k != "kl/mean"} for row in ROWS],
            "step 1, kl/mean: 0.1 and absent",
        ),
        (changed(2, new=1.0), "step 2, new: absent and 1.0"),
        (changed(1, kl__mean=-0.1), "step 1, kl/mean: 0.1 and -0.1"),
    ],
)
def test_what_differs_beyond_any_tolerance(
    tmp_path: Path, capsys, rows: list[dict], named: str
) -> None:
    folders = pair(tmp_path, rows)
    assert main([*folders, "--tolerance", "0.5"]) == 1
    assert named in capsys.readouterr().err


def test_the_largest_differences_come_first(tmp_path: Path, capsys) -> None:
    a = [{"step": s, "small": 1.0, "large": 1.0} for s in (1, 2)]
    b = [{"step": 1, "small": 1.001, "large": 1.0}, {"step": 2, "small": 1.0, "large": 2.0}]
    assert main(pair(tmp_path, b, a)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 numbers compared, 2 differ"
    assert lines[2].split() == ["large", "1", "2", "1.0", "2.0", "0.5"]
    assert lines[3].split()[0] == "small"


def test_mistakes_exit_2_on_one_screen(tmp_path: Path, capsys) -> None:
    a, b = pair(tmp_path, ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    write_rows(tmp_path / "twice/metrics.jsonl", [ROWS[0], ROWS[0]])
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other/metrics.jsonl", [{"step": 99, "kl/mean": 1.0}])
    cases = [
        [a, str(tmp_path / "nope")],
        [str(tmp_path / "empty"), b],
        [a, str(tmp_path / "twice")],
        [a, str(tmp_path / "other")],
    ]
    for folders in [*cases, [a, b, "--tolerance", "-1"]]:
        assert main([*folders, "--assert-equal"]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and 0 < len(error.splitlines()) <= 4
    assert len(cases) == 4
    with pytest.raises(SystemExit) as stopped:
        main([a])
    assert stopped.value.code == 2
