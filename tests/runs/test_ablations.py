"""Every ablation of algorithm.md section 7 runs three tiny steps on the planted data, and leaves
the marks that are its own.

Real posts go through the same start: tiny/tldr_gipo from nothing but a folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.data.fixtures import SHARED, needs_shared_data
from tests.runs import chain

NAMES = (
    "cvar",
    "gipo_paper",
    "group_dro",
    "kl_only",
    "oracle_groups",
    "random_groups",
    "return_variance",
    "variance_only",
)
SIZES = [
    "batch.prompts=8",
    "batch.responses=2",
    "batch.minibatch=8",
    "batch.micro_batch=4",
    "batch.micro_tokens=null",
    "algorithm.critic_warmup=1",
    "algorithm.reward.anchor=none",  # planted prompts have no chosen responses
]
RATES = [
    "models.actor.lr=1e-4",
    "models.actor.warmup_steps=1",
    "models.critic.lr=3e-4",
    "models.critic.warmup_steps=1",
]
ETA = 0.05  # base recipes' price of a nat


def case(name: str, base: Path) -> list[str]:
    """The repository's ablation, exchanged for model, machine, data and size."""
    loads = [f"models.actor.load={base}/sft/final", f"models.reward.load={base}/rm/final"]
    where = [f"run.dir={base}/ablation_{name}", "run.steps=3", "run.eval_every=0"]
    return [
        f"recipe=ablation/{name}",
        "with=model/tiny,hardware/cpu,data/planted",
        *chain.SMALL,
        *SIZES,
        *RATES,
        *loads,
        *where,
    ]


def tldr(base: Path) -> list[list[str]]:
    """One step, with subreddits as labels; no case where the data are not there."""
    words = [
        f"data.path={SHARED / 'tldr'}",
        "data.columns={source: subreddit}",
        f"run.dir={base}/tldr_gipo",
        "run.steps=1",
        "run.eval_every=0",
    ]
    return [["recipe=tiny/tldr_gipo", *chain.SMALL, *words]] if SHARED.is_dir() else []


@pytest.fixture(scope="module")
def ran(base: Path) -> dict[str, list[dict[str, float]]]:
    """name -> the rows of its metrics.jsonl; one start for all."""
    chain.run_cases([*(case(name, base) for name in NAMES), *tldr(base)], base, processes=1)
    found = {}
    for name in NAMES:
        rows = chain.rows(base / f"ablation_{name}")
        assert [row["step"] for row in rows] == [1, 2, 3]
        found[name] = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    return found


@pytest.mark.multiprocess
def test_all_of_them_train_and_measure_groups(ran: dict[str, list[dict[str, float]]]) -> None:
    always = (
        "groups/gap",
        "groups/return_worst",
        "groups/ami",
        "groups/auc",
        "groups/mass_min",
        "weights/mean",
        "value/loss",
        "kl/mean",
    )
    checked = 0
    for name, rows in ran.items():
        for row in rows:
            assert all(math.isfinite(row[key]) for key in always), (name, row)
            assert 0 <= row["groups/auc"] <= 1 and row["groups/ami"] <= 1
            checked += 1
        assert (
            "policy/loss" not in rows[0]
            and math.isfinite(rows[1]["policy/loss"])
            and math.isfinite(rows[2]["policy/loss"])
        )
    assert checked == 8 * 3


@pytest.mark.multiprocess
def test_fixed_prices_and_adaptive_ones(ran: dict[str, list[dict[str, float]]]) -> None:
    fixed = ("cvar", "return_variance", "variance_only")
    for name in fixed:
        assert [row["kl/coef_mean"] for row in ran[name]] == pytest.approx([ETA] * 3)
        assert all("kl/ramp" not in row for row in ran[name])
    adaptive = [name for name in NAMES if name not in fixed]
    assert all(0 <= row["kl/ramp"] <= 1 for name in adaptive for row in ran[name])
    assert len(adaptive) == 5


@pytest.mark.multiprocess
def test_weights(ran: dict[str, list[dict[str, float]]]) -> None:
    """Mean 1 and not clamped, so that each is what its formula says; all 1 without the variance
    term; CVaR's are 0 or 1 / alpha; the paper's have no lower bound."""
    for name in NAMES:
        for row in ran[name]:
            assert (
                row["weights/mean"] == pytest.approx(1, abs=1e-5) and row["weights/clamped"] == 0
            ), name
            lowest, highest = row["weights/min"], row["weights/max"]
            if name == "kl_only":
                assert lowest == highest == 1
            elif name == "cvar":
                assert (lowest, highest) == (0, 2)
            else:
                assert lowest < 1 < highest < 3 and (lowest > 0 or name == "gipo_paper"), name


@pytest.mark.multiprocess
def test_oracle_groups_measure_a_learner_against_the_known_labels(
    ran: dict[str, list[dict[str, float]]], base: Path
) -> None:
    """What is used is the source (p_high 0 or 1, no entropy); what ami and auc judge is a head that
    has seen no label."""
    rows = ran["oracle_groups"]
    for row in rows:
        assert {row["source/easy/p_high"], row["source/hard/p_high"]} == {0.0, 1.0} and row[
            "groups/label_entropy"
        ] == 0
    assert any(row["groups/ami"] < 0.99 for row in rows)  # the known labels' own would be 1
    assert math.isnan(rows[0]["groups/flip_rate"]) and math.isfinite(rows[1]["groups/flip_rate"])
    samples = [
        json.loads(line)
        for line in (base / "ablation_oracle_groups" / "samples.jsonl").read_text().splitlines()
    ]
    weights = {
        (s["step"], s["source"]): {
            t["weight"] for t in samples if (t["step"], t["source"]) == (s["step"], s["source"])
        }
        for s in samples
    }
    # one weight a group
    assert len(weights) == 6 and all(len(group) == 1 for group in weights.values())


@pytest.mark.multiprocess
def test_random_groups_know_nothing(ran: dict[str, list[dict[str, float]]]) -> None:
    for row in ran["random_groups"]:
        assert row["groups/label_entropy"] == 0 and "groups/flip_rate" not in row
        assert abs(row["groups/ami"]) < 0.9


@pytest.mark.multiprocess
def test_the_papers_gipo_reads_the_whole_trajectory(ran: dict[str, list[dict[str, float]]]) -> None:
    """Labels of two responses to one prompt differ, so that they can split good from bad; with
    `input: prompt` they cannot."""
    assert any(row["groups/response_split"] != 0.5 for row in ran["gipo_paper"])
    assert all(row["groups/response_split"] == pytest.approx(0.5) for row in ran["variance_only"])


@pytest.mark.multiprocess
@needs_shared_data
def test_gipo_on_tldr_posts(ran: dict[str, list[dict[str, float]]], base: Path) -> None:
    """The prompts are posts, labelled by subreddit; bytes, so none is longer than 960."""
    (row,) = chain.rows(base / "tldr_gipo")
    assert (
        math.isfinite(row["value/loss"] or math.nan)
        and "source/relationships/score" in row
        and "groups/ami" in row
    )
    samples = [
        json.loads(line) for line in (base / "tldr_gipo" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 16
    for sample in samples:
        assert sample["prompt"].startswith(
            f"SUBREDDIT: r/{sample['source']}\n\nTITLE: "
        ) and sample["prompt"].endswith("\n\nTL;DR:")
        assert len(sample["prompt"].encode()) < 960
