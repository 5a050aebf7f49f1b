"""Steps and epochs of a run: from the rows that are trained on, and before any are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import Example, Tally
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.recipe.length import (
    describe_length,
    expected_rows,
    num_steps,
    rows_a_step,
    stated_length,
)
from tests.recipe.helpers import problems, small

TOKENIZER = byte_tokenizer()
SFT = """\
defaults: [base/sft, model/tiny, hardware/cpu]
models: {actor: {load: random}}
batch: {minibatch: 4, micro_batch: 2}
data: {max_length: 64, max_response: 16}
run: {dir: runs/small, epochs: 1}
"""
PROMPTS = """\
defaults: [base/gipo, model/tiny, hardware/cpu]
models: {actor: {load: random}, reward: {load: random}}
batch: {prompts: 8, responses: 2, minibatch: 8, micro_batch: 2}
data: {max_length: 64, max_response: 16}
run: {dir: runs/small, steps: 10}
"""
PLANTED = [
    "data.format=planted",
    "data.planted.prompts=40",
    "data.planted.held_out=0.2",
    "data.planted.pairs_per_prompt=6",
]


@pytest.mark.parametrize("words", [["run.steps=3"], ["run.epochs=null"]])
def test_one_of_the_two_is_set(tmp_path: Path, words: list[str]) -> None:
    (problem,) = problems(tmp_path, *words, text=SFT)
    assert problem.key == "run.steps" and "run.epochs" in problem.what and problem.fix
    assert small(tmp_path, "run.steps=3", "run.epochs=null", text=SFT).run.steps == 3


def test_a_gold_model_needs_evaluations(tmp_path: Path) -> None:
    gold = ["data.format=planted", "models.gold.load=random"]
    assert "gold" in small(tmp_path, *gold, text=PROMPTS).models
    assert "gold" not in small(tmp_path, *gold, "models.gold.load=''", text=PROMPTS).models
    (problem,) = problems(tmp_path, *gold, "run.eval_every=0", text=PROMPTS)
    assert problem.key == "models.gold.load" and "run.eval_every is 0" in problem.what


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(8, 1, 2), (9, 1, 3), (10, 2, 5), (11, 2, 6), (1, 1, 1)]
)
def test_steps_of_epochs(tmp_path: Path, rows: int, epochs: int, steps: int) -> None:
    """Batches of 4: by hand. The last one goes on with rows of the next pass."""
    recipe = small(tmp_path, f"run.epochs={epochs}", text=SFT)
    assert rows_a_step(recipe) == 4 and num_steps(recipe, rows) == steps
    assert num_steps(small(tmp_path, "run.epochs=null", "run.steps=7", text=SFT), rows) == 7
    examples = [Example("text", (), ("a",), "s", {})] * rows
    data = Dataset(examples, Encoder(recipe.data, TOKENIZER), 0, "sft", Tally())
    read = [row for step in range(steps) for row in data.order(step, 4)]
    assert all(read.count(row) >= epochs for row in range(rows))
    assert len(read) - epochs * rows < 4


@pytest.mark.parametrize("part", ["", "1/2", "2/3"])
@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_planted_rows_are_known_before_they_are_made(tmp_path: Path, part: str, kind: str) -> None:
    config = small(tmp_path, *PLANTED, f"data.part={part!r}", text=SFT).data
    made = load_data(config, TOKENIZER, "train", 0, kind)
    assert expected_rows(config, kind) == len(made) > 0


def test_stated_rows(tmp_path: Path) -> None:
    assert expected_rows(DataConfig(rows=900), "sft") == 900
    assert expected_rows(DataConfig(rows=900, part="2/3"), "sft") == 300
    assert expected_rows(DataConfig(), "sft") == 0


def test_lengths_in_words(tmp_path: Path) -> None:
    """With planted rows 40 × 0.8 prompts, 6 responses each."""
    sft = small(tmp_path, *PLANTED, text=SFT)
    assert stated_length(sft) == ("48 steps × 4 rows = 1.00 epochs of 192", 48)
    ppo = small(tmp_path, *PLANTED, text=PROMPTS)
    assert stated_length(ppo) == ("10 steps × 8 prompts = 2.50 epochs of 32", 10)
    assert describe_length(ppo, 8000) == "10 steps × 8 prompts = 0.0100 epochs of 8,000"
    other = ["data.path=rows.jsonl", "data.format=sft"]
    stated = small(tmp_path, *other, "data.rows=50000", text=SFT)
    words = "12,500 steps × 4 rows = 1.00 epochs of about 50,000 (data.rows)"
    assert stated_length(stated) == (words, 12500)
    words, steps = stated_length(small(tmp_path, *other, text=SFT))
    assert steps == 0 and words.startswith("run.epochs 1, 4 rows a step")
    assert stated_length(small(tmp_path, *other, text=PROMPTS)) == ("10 steps × 8 prompts", 10)
