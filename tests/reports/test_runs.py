from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.reports.runs import group_by_seed, in_bins, load_run, read_rows
from tests.reports.synthetic import ppo_run, sft_run, write_rows


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=20))
    assert (run.name, run.stage, run.num_steps, run.seconds) == ("gipo", "PPO", 20, 50.0)
    steps, values = run.series("eval/gold")
    assert steps == [10, 20] and len(values) == 2
    # null is no point
    assert run.series("source/helpful/score")[0] == [s for s in range(1, 21) if s % 3]
    assert run.last("no/such") is None and len(run.alerts) == 1
    assert run.headline[0] == ("eval/score", "held-out score")
    assert load_run(sft_run(tmp_path / "sft")).stage == "SFT"


def test_stage_is_what_the_run_recorded(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "my/loss": 1.0}])
    run = load_run(tmp_path)
    assert (run.stage, run.headline) == ("–", [])
    about = '{"stage": "mine", "headline": [["my/loss", "my loss"]]}'
    (tmp_path / "environment.json").write_text(about)
    run = load_run(tmp_path)
    assert (run.stage, run.headline) == ("mine", [("my/loss", "my loss")])
    (tmp_path / "environment.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"environment\.json is not YAML"):
        load_run(tmp_path)


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "x')
    assert [row["step"] for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 1}\n{oops\n{"step": 2}\n', 2),
        ('{"x": 1}\n', 1),
        ("[1]\n", 1),
        ('{"step": "1"}\n', 1),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        load_run(tmp_path)
    assert error.value.where.endswith(f"metrics.jsonl:{line}")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        load_run(tmp_path / "nope")
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"no metrics\.jsonl") as error:
        load_run(tmp_path)
    assert "recipe.yaml" in error.value.fix
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    with pytest.raises(UserError, match="not YAML"):
        load_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a mapping"):
        load_run(tmp_path)


def test_seeds_are_one_group_with_a_band(tmp_path: Path) -> None:
    runs = [load_run(ppo_run(tmp_path / f"gipo_seed{s}", seed=s, steps=12)) for s in range(3)]
    runs.insert(1, load_run(ppo_run(tmp_path / "ppo", beta=0.0, steps=12)))
    groups = group_by_seed(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("gipo (3 seeds)", 3), ("ppo", 1)]
    steps, mean, low, high = groups[0].band("groups/gap")
    by_hand = [run.series("groups/gap")[1][4] for run in groups[0].runs]
    assert steps == list(range(1, 13))
    assert (mean[4], low[4], high[4]) == pytest.approx(
        (sum(by_hand) / 3, min(by_hand), max(by_hand))
    )
    assert groups[0].band("sft/loss") == ([], [], [], [])


def test_a_sweeps_folders_are_called_by_their_parent(tmp_path: Path) -> None:
    for parent, names, label in (
        ("sweep", ("seed=0", "seed=1"), "sweep"),
        ("s", ("eta=0.02,seed=0", "eta=0.02,seed=1"), "eta=0.02"),
    ):
        runs = [
            load_run(ppo_run(tmp_path / parent / name, seed=i, steps=2))
            for i, name in enumerate(names)
        ]
        assert [g.label for g in group_by_seed(runs)] == [f"{label} (2 seeds)"]


def test_runs_without_recipe_stay_apart_and_equal_names_get_their_folder(tmp_path: Path) -> None:
    runs = [load_run(ppo_run(tmp_path / f"{d}/gipo", recipe=False, steps=2)) for d in "ab"]
    assert [g.label for g in group_by_seed(runs)] == ["a/gipo", "b/gipo"]


def test_bins_keep_the_mean() -> None:
    steps, values = list(range(1000)), [float(s) for s in range(1000)]
    x, y = in_bins(steps, values, 100)
    assert len(x) == len(y) == 100 and y[0] == 4.5 and y[-1] == 994.5
    assert in_bins([1, 2], [3.0, 4.0], 100) == ([1, 2], [3.0, 4.0])
