"""Study S4: the whole chain at a tiny size, the comparison at equal KL by hand, the plan, the stop
rule."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.files import append_jsonl
from tests import forked
from tests.conversion.families import write_hf
from tests.data.fixtures import dialogue, write_rows
from tests.forked import ROOT
from tools import study
from tools.studies import s4
from tools.studies.compare import highest as one_curve
from tools.studies.s4_cells import (
    CELLS,
    CONTROLS,
    Accuracy,
    Cell,
    Models,
    load_cells,
    load_models,
)
from tools.studies.s4_compare import DIFFICULTY, PROMPTS, SOURCES, Study, findings, highest
from tools.studies.s4_tables import page

# ------------------------------------------------------------------------------- the whole chain

TEST_ROWS = 24  # of each source


def data(folder: Path, learnable: bool) -> Path:
    """HH's layout. The chosen response is full of a, the rejected one of b; or both are neither."""
    draw = np.random.default_rng(0)
    for source in ("harmless-base", "helpful-base"):
        for split, count in (("train", 60), ("test", TEST_ROWS)):
            rows = []
            for i in range(count):
                start = dialogue(f"h: {source[:7]} {split} {i}?")
                words = ["aaa", "bbb"]
                if not learnable:
                    words = [str(draw.integers(10**4, 10**5)) for _ in range(2)]
                chosen, rejected = (f"{start}\n\nAssistant: {word}" for word in words)
                rows.append({"chosen": chosen, "rejected": rejected})
            write_rows(folder / source / f"{split}.jsonl", rows)
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [
        "s4",
        "minutes=60",
        "seeds=1",
        f"out={folder / 'out'}",
        f"model.hub={folder / 'model'}",
        f"data.path={folder / 'data'}",
        "with=hardware/cpu",
        "data.template=hh",
        "data.max_length=72",
        "data.max_response=8",
        "batch.minibatch=8",
        "batch.micro_tokens=1152",
        "rm:models.reward.lr=3e-3",
        "ppo:batch.prompts=4",
        "ppo:batch.responses=2",
        "ppo:algorithm.critic_warmup=1",
        "ppo:models.actor.lr=3e-3",
        "ppo:models.actor.warmup_steps=1",
        *more,
    ]


def start(folder: Path, *more: str) -> forked.Finished:
    done = forked.run(ROOT / "tools" / "study.py", *words(folder, *more), timeout=280)
    assert done.code == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def first_turns(folder: Path, part: str) -> set[str]:
    config = DataConfig(path=str(folder / "data"), template="hh", part=part)
    rows = load_data(config, byte_tokenizer(), "train", 0, "preference").rows
    return {row.prompt[0].text for row in rows}


def test_the_whole_chain_and_its_resume(tmp_path: Path) -> None:
    write_hf(tmp_path / "model", "llama2", num_hidden_layers=1, max_position_embeddings=128)
    data(tmp_path / "data", learnable=True)
    start(tmp_path, "steps=2", "rm_epochs=3")
    out = tmp_path / "out"
    cells = load_cells(out / "cells.jsonl")
    every = [("start", 0.0), ("start_again", 0.0), *CELLS, *CONTROLS]
    assert [cell.key for cell in cells] == [(0, *cell) for cell in every]
    for cell in cells:
        columns = (cell.gold, cell.proxy, cell.kl, cell.tokens, cell.finished, cell.refuses)
        assert {len(x) for x in (*columns, cell.prompts, cell.source)} == {2 * TEST_ROWS}
        assert np.isfinite([cell.gold, cell.proxy, cell.kl]).all()
    first, again, *trained = cells
    assert set(first.source) == {"harmless-base", "helpful-base"}
    # other noise gives other responses; the start is its own reference
    assert first.gold != again.gold and max(map(abs, first.kl)) < 1e-4
    assert [cell.iterations for cell in trained] == [2] * len(trained)
    assert all(np.mean(cell.kl) > 0.01 for cell in trained)
    prices = {cell.key[1:]: cell.price for cell in trained}
    assert prices["ppo_kl", 0.15] == pytest.approx(0.15)
    assert prices["adaptive", 0.05] == pytest.approx(0.05)

    settings = {
        file.parent.name: yaml.safe_load(file.read_text())
        for file in (out / "seed_0").glob("*/recipe.yaml")
    }
    assert len(settings) == 4 + len(CELLS) + len(CONTROLS)
    seeds = set()
    for name, recipe in settings.items():
        part = {"rm": "1/3"}.get(name, "2/3" if name.startswith("rm_gold") else "3/3")
        assert recipe["data"]["part"] == part
        if part == "3/3":
            assert recipe["algorithm"]["reward"]["anchor"] == "chosen"
        else:
            assert recipe["algorithm"]["centre"] == 0.01
            seeds.add(recipe["run"]["seed"])
    assert len(seeds) == 4
    parts = [first_turns(tmp_path, f"{k}/3") for k in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 120

    (models,) = load_models(out / "models.jsonl").values()
    assert models.gold.low > 0.55 and models.gold.pairs == 2 * TEST_ROWS
    text = (out / "s4_tables.md").read_text(encoding="utf-8")
    assert "1 complete seeds, 48 test prompts" in text and "1 of 3 seeds" in text
    assert "Stopped" not in text and (out / "s4.svg").stat().st_size > 10_000

    file = out / "cells.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    done = start(tmp_path, "steps=2", "rm_epochs=3")
    assert re.findall(r"seed 0: (\S+) is done", done.stdout) == ["group_dro_0.05"]
    repeated = load_cells(file)
    assert [cell.key for cell in repeated] == [cell.key for cell in cells]
    assert repeated[-1].gold == pytest.approx(cells[-1].gold, abs=1e-4)

    shutil.rmtree(out / "seed_0")  # a fresh machine with a copy of the small files
    file.write_bytes(b"".join(lines[:-1]))
    done = start(tmp_path, "steps=2", "rm_epochs=3")
    assert "seed 0: its reward models are not in" in done.stdout
    assert len(load_cells(file)) == len(cells) - 1


def test_gold_models_that_are_no_better_than_chance_end_the_study(tmp_path: Path) -> None:
    write_hf(tmp_path / "model", "llama2", num_hidden_layers=1, max_position_embeddings=128)
    data(tmp_path / "data", learnable=False)
    done = start(tmp_path, "rm_epochs=1")
    out = tmp_path / "out"
    (models,) = load_models(out / "models.jsonl").values()
    assert models.gold.low <= 0.55 and f"{models.gold.share:.3f}" in done.stdout
    assert not (out / "cells.jsonl").exists() and not (out / "plan.json").exists()
    assert {path.name for path in (out / "seed_0").iterdir() if path.is_dir()} == {
        "rm", "rm_gold_1", "rm_gold_2", "rm_gold_3",
    }  # fmt: skip
    text = (out / "s4_tables.md").read_text(encoding="utf-8")
    assert "**Stopped at seed 0.**" in text and "pre-registered" not in text
    before = out / "models.jsonl"
    size = before.stat().st_size
    study.main(words(tmp_path, "train=false"))
    assert before.stat().st_size == size


# -------------------------------------------------------------------------- what fits, the command


def test_the_plan_leaves_room_for_four_cells() -> None:
    """(600 / 4 - 10) / 1.4 = 100; twice as slow: 50; then 40 at least, so that fewer cells fit."""
    assert s4.planned(600, 1.4, 10, 100).iterations == 100
    assert s4.planned(600, 2.8, 10, 100).iterations == 50
    assert s4.planned(600, 10.0, 10, 100).iterations == 40
    assert s4.planned(600, 0.1, 10, 100).iterations == 100
    assert s4.Plan(50, 2.8, 10).seconds == pytest.approx(150)


def test_options() -> None:
    given = s4.parse(["minutes=9", "out=x", "data.path=hh", "with=hardware/cpu", "rm:run.seed=3"])
    assert (given.minutes, given.out, given.docs) == (9, Path("x"), None)
    assert given.words == ("data.path=hh", "with=hardware/cpu", "rm:run.seed=3")
    for word in ("minutes=x", "seeds=0", "docs=", "train=maybe", "data.path=", "unknown=1", "s4"):
        with pytest.raises(UserError, match="cannot use"):
            s4.parse([word])


def test_three_seeds_are_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    append_jsonl(out / "models.jsonl", [asdict(models_of(seed)) for seed in range(3)])
    append_jsonl(out / "cells.jsonl", [asdict(cell) for cell in cells_of([0, 1])])
    words = ["s4", "train=false", f"out={out}", f"docs={tmp_path / 'docs'}"]
    with pytest.raises(UserError, match="2 complete seeds; 3 are published"):
        study.main(words)
    assert (out / "s4_tables.md").exists() and not (tmp_path / "docs").exists()
    append_jsonl(out / "cells.jsonl", [asdict(cell) for cell in cells_of([2])])
    study.main(words)
    for name in ("s4_tables.md", "s4.svg"):
        assert (out / name).read_bytes() == (tmp_path / "docs" / name).read_bytes()


def test_nothing_was_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model has been trained"):
        study.main(["s4", "train=false", f"out={tmp_path}"])


# ------------------------------------------------------------------------------- the comparison


def models_of(seed: int) -> Models:
    found = Accuracy(0.7, 0.65, 0.75, 300)
    return Models(seed, found, found, [0.7, 0.7, 0.7], 10.0, "a card")


def cell(seed: int, system: str, eta: float, kl: float, gold: Sequence[float] | np.ndarray) -> Cell:
    count = len(gold)
    numbers = [float(x) for x in gold]
    return Cell(
        seed, system, eta, 0 if system.startswith("start") else 100, eta,
        [f"p{i}" for i in range(count)],
        ["a" if i % 2 else "b" for i in range(count)],
        numbers, numbers, [kl] * count, [10 + i % 3 for i in range(count)],
        [True] * count, [False] * count,
    )  # fmt: skip


def cells_of(seeds: Sequence[int], count: int = PROMPTS, above: float = 0.5) -> list[Cell]:
    """The curve: (0, 0), (0.5, 0.1), (1, 0.2), (2, 0.6). The systems lie `above` it at KL 1.5."""
    ones = np.ones(count)
    points = [("start", 0.0, 0.0, 0.0), ("ppo_kl", 0.15, 0.5, 0.1)]
    points += [("ppo_kl", 0.05, 1.0, 0.2), ("ppo_kl", 0.02, 2.0, 0.6)]
    points += [(s, 0.05, 1.5, 0.4 + above) for s in ("gipo_head", "gipo_value", "adaptive")]
    made = [cell(s, *point[:3], point[3] * ones) for s in seeds for point in points]
    return [*made, *(cell(s, "start_again", 0.0, 0.0, np.arange(count)) for s in seeds)]


def test_a_difference_at_equal_kl_by_hand() -> None:
    """At KL 1.5 the curve is half-way from 0.2 to 0.6; the system has 0.9."""
    found = Study(cells_of([0, 1, 2]))
    difference = found.difference("gipo_head", found.mean)
    assert difference is not None and difference.value == pytest.approx(0.5)
    assert difference.interval == pytest.approx((0.5, 0.5))
    assert difference.p == pytest.approx(1 / 2001)
    assert found.complete == [0, 1, 2]
    verdicts = [f.verdict(3) for f in findings(found)]
    assert verdicts == ["shown"] * 6
    assert all(f.p == pytest.approx(6 / 2001) for f in findings(found))
    assert "+0.500 [+0.500, +0.500]" in page(found, [models_of(0)], 0.55, 3)


def test_what_is_not_shown_has_its_reasons() -> None:
    few = findings(Study(cells_of([0], count=8)))[0].verdict(3)
    assert few == "not shown: 1 of 3 seeds; 8 of 300 test prompts"
    lower = findings(Study(cells_of([0, 1, 2], above=-0.1)))[0].verdict(3)
    assert "the worse group's lower bound is not above 0" in lower
    assert "the mean's lower bound is not above −0.02" in lower
    beyond = [
        replace(c, kl=[3.0] * len(c.kl)) if c.system == "adaptive" else c for c in cells_of([0])
    ]
    outside = [f for f in findings(Study(beyond)) if f.system == "adaptive"]
    assert [(f.verdict(1), f.p) for f in outside] == [
        ("not shown: not run, or outside of the curve", 1.0)
    ] * 2


def test_the_worse_group_is_the_worse_one_of_each_kind() -> None:
    """Prompts 0 and 2 are of source b, 1 and 3 of a; by the start's responses 0 and 1 are hard."""
    cells = cells_of([0], count=4)
    made = Study([*cells, cell(0, "oracle", 0.05, 1.5, [0.0, 1.0, 2.0, 9.0])])
    oracle = made.of[0, "oracle", 0.05]
    assert made.worse(oracle, SOURCES)[0] == 1.0  # (0 + 2) / 2 against (1 + 9) / 2
    assert made.worse(oracle, DIFFICULTY)[0] == 0.5
    groups = made.groups(0, DIFFICULTY)
    assert groups["hard"].tolist() == [True, True, False, False]


def test_the_interval_is_over_prompts_and_over_seeds() -> None:
    """One seed: ± 1.96 sd / sqrt(prompts). Two seeds that disagree: from one to the other."""
    noise = np.random.default_rng(5).normal(0.4, 1, 400)
    base = [c for c in cells_of([0], count=400) if c.system != "gipo_head"]
    one = Study([*base, cell(0, "gipo_head", 0.05, 1.5, noise)])
    found = one.difference("gipo_head", one.mean)
    assert found is not None
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(1.96 * noise.std() / 20, rel=0.1)
    assert found.value == pytest.approx(noise.mean() - 0.4, abs=1e-6)
    two = Study([*cells_of([0], above=0.5), *cells_of([1], above=-0.3)])
    both = two.difference("gipo_head", two.mean)
    assert both is not None and both.value == pytest.approx(0.1)
    assert both.interval == pytest.approx((-0.3, 0.5))
    cut = [c for c in cells_of([2], above=9.0) if c.system != "adaptive"]
    three = Study([*cells_of([0], above=0.5), *cells_of([1], above=-0.3), *cut])
    kept = three.difference("gipo_head", three.mean)
    assert kept is not None and kept.value == pytest.approx(0.1), "a cut seed does not count"


def test_many_curves_at_once_are_one_curve_each() -> None:
    draw = np.random.default_rng(2)
    points, y = draw.normal(size=(2, 50, 4))
    points[0, 1] = points[0, 0]
    x = draw.normal(size=50)
    with np.errstate(invalid="ignore"):
        expected = [one_curve(*row) for row in zip(x, points, y, strict=True)]
    assert highest(x, points, y) == pytest.approx(expected, nan_ok=True)
    assert 5 < np.isnan(expected).sum() < 45


def test_a_length_controlled_rate_against_the_same_price() -> None:
    """The system is better on every prompt with an even number, PPO with KL on the others."""
    cells = cells_of([0], count=40)
    mixed = cell(0, "oracle", 0.05, 1.5, [1.0 if i % 2 == 0 else 0.0 for i in range(40)])
    made = Study([*cells, mixed])
    found = made.against_baseline(mixed)
    assert found is not None
    assert (found["win"], found["tie"], found["lose"]) == (20, 0, 20)
    assert found["length_controlled_win"] == pytest.approx(0.5)
    assert made.against_baseline(made.of[0, "ppo_kl", 0.05]) is None


def test_cells_of_other_prompts_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    append_jsonl(file, [asdict(c) for c in (*cells_of([0], count=4), *cells_of([1], count=5))])
    with pytest.raises(UserError, match="different test prompts"):
        load_cells(file)
