from __future__ import annotations

import math
from pathlib import Path

import pytest

from gipo_megatron.reports import gold
from gipo_megatron.reports.runs import RunFolder, group_by_seed, load_run
from tests.reports.synthetic import EVALUATED, ppo_run, sft_run, with_gold, write_rows


def run_of(folder: Path, easy: list[float], hard: list[float], **options) -> RunFolder:
    return load_run(with_gold(ppo_run(folder, **options), {"easy": easy, "hard": hard}, kl=2.5))


def test_table_by_hand(tmp_path: Path) -> None:
    """60 prompts a source; gold 0 or 1, so s² = p (1 − p) n / (n − 1)."""
    run = run_of(tmp_path / "ppo", [0.2, 0.9, 0.4], [0.1, 0.3, 0.5])
    header, final, peak, fall = gold.table(group_by_seed([run]))
    columns = ["easy", "hard", "worse group", "all prompts", "gap", "KL"]
    assert header == ["system", "held-out gold", *columns]
    of_source = math.sqrt(0.4 * 0.6 / (EVALUATED - 1)), math.sqrt(0.5 * 0.5 / (EVALUATED - 1))
    of_all = math.sqrt(0.45 * 0.55 / (2 * EVALUATED - 1))
    easy, hard = f"0.400 ± {of_source[0]:.3f}", f"0.500 ± {of_source[1]:.3f}"
    mean = f"0.450 ± {of_all:.3f}"
    assert final == ["ppo", "final, step 40", easy, hard, easy, mean, "0.100", "2.50"]
    assert peak == ["", "peak", "0.900", "0.500", "0.400", "0.600", "", ""]
    assert fall == ["", "final − peak", "-0.500", "+0.000", "+0.000", "-0.150", "", ""]


def test_seeds_have_the_error_over_seeds(tmp_path: Path) -> None:
    """Worse group: hard in one seed, easy in the other; 0.4 and 0.6, s = 0.2 / √2."""
    runs = [
        run_of(tmp_path / "gipo_seed0", [0.2, 0.8], [0.1, 0.4], seed=0),
        run_of(tmp_path / "gipo_seed1", [0.2, 0.6], [0.1, 0.9], seed=1),
    ]
    _, final, *_ = gold.table(group_by_seed(runs))
    assert final[0] == "gipo (2 seeds)"
    assert final[2:6] == ["0.700 ± 0.100", "0.650 ± 0.250", "0.500 ± 0.100", "0.675 ± 0.075"]


def test_of_several_replicas_the_first_gives_s_and_all_prompts_count(tmp_path: Path) -> None:
    run = run_of(tmp_path / "ppo", [0.2, 0.4], [0.1, 0.5])
    half = [row for i, row in enumerate(run.held_out) if i % 2 == 0]
    write_rows(run.path / "held_out.jsonl", half)
    one, first = run, load_run(run.path)
    whole, part = (
        gold.error_over_prompts(r, "hard", [*gold.by_prompt(r, "hard").values()])
        for r in (one, first)
    )
    assert len(gold.by_prompt(first, "hard")) == 30 and part == pytest.approx(whole, rel=0.02)


def test_systems_without_gold_or_with_other_sources(tmp_path: Path) -> None:
    runs = [
        load_run(sft_run(tmp_path / "sft")),
        load_run(ppo_run(tmp_path / "plain")),
        load_run(with_gold(ppo_run(tmp_path / "a", beta=0.0), {"easy": [0.0, 1.0]})),
        load_run(with_gold(ppo_run(tmp_path / "b", beta=0.5), {"hard": [0.0, 0.0]})),
    ]
    assert gold.table(group_by_seed(runs[:2])) == []
    rows = gold.table(group_by_seed(runs))
    assert [row[0] for row in rows] == ["system", "a", "", "", "b", "", ""]
    assert all(len(row) == 8 for row in rows)
    assert rows[1][2:5] == ["1.000", "–", "1.000"]
    assert rows[4][2:5] == ["–", "0.000", "0.000"]


def test_without_responses_no_error(tmp_path: Path) -> None:
    run = run_of(tmp_path / "ppo", [0.2, 0.4], [0.1, 0.5])
    (run.path / "held_out.jsonl").unlink()
    assert gold.table(group_by_seed([load_run(run.path)]))[1][2:4] == ["0.400", "0.500"]
