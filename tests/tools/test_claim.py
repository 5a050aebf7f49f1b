from __future__ import annotations

import math
from pathlib import Path

import pytest

from gipo_megatron.reports.gold import table
from gipo_megatron.reports.runs import SeedGroup, load_run
from tests.reports.synthetic import ppo_run, sft_run, with_gold
from tools.claim import equal_kl, judge, main

STUDY = """# Study S3: tables

Five seeds.

## Claims

| system | worse group | verdict |
| --- | --- | --- |
| GIPO | +0.150 [+0.100, +0.200] | **shown** |
| adaptive KL |  | not shown: not run yet |

## Others

| a |
| --- |
"""


def demo(folder: Path, gipo: dict[str, list[float]], kl: float = 3.0) -> list[str]:
    """PPO with KL ends at easy 0.9, hard 0.5 and KL 3."""
    ppo = ppo_run(folder / "ppo_kl", beta=0.0, steps=12)
    with_gold(ppo, {"easy": [0.2, 0.9], "hard": [0.0, 0.5]}, kl=3.0)
    with_gold(ppo_run(folder / "gipo", steps=12), gipo, kl=kl)
    return [str(folder / "ppo_kl"), str(folder / "gipo")]


@pytest.mark.parametrize(
    ("easy", "hard", "verdict"),
    [
        (0.9, 0.7, "It holds on this run."),
        (0.7, 0.7, "It holds on this run."),  # mean equal
        (0.65, 0.7, "It does NOT hold on this run."),  # mean lower by 0.025
        (0.9, 0.5, "It does NOT hold on this run."),  # equal is not higher
        (0.45, 0.9, "It does NOT hold on this run."),  # its worse group is the other one
    ],
)
def test_verdict(tmp_path: Path, easy: float, hard: float, verdict: str) -> None:
    runs = [load_run(r) for r in demo(tmp_path, {"easy": [0.2, easy], "hard": [0.0, hard]})]
    claim = judge(runs)
    assert claim is not None and claim.verdict.endswith(verdict) and "0.02" in claim.verdict


def test_errors_are_paired_over_prompts_where_the_worse_group_is_the_same(tmp_path: Path) -> None:
    """Hard: 12 of 60 prompts differ by 1, others by 0. All: the same 12 of 120."""
    runs = [load_run(r) for r in demo(tmp_path, {"easy": [0.2, 0.9], "hard": [0.0, 0.7]})]
    claim = judge(runs)
    assert claim is not None
    worse, mean = math.sqrt(0.2 * 0.8 / 59), math.sqrt(0.1 * 0.9 / 119)
    assert f"worse group +0.200 ± {worse:.3f}, mean +0.100 ± {mean:.3f}" in claim.sentences[0]
    assert not any("no difference is shown" in sentence for sentence in claim.sentences)
    # the worse groups differ: independent prompts
    runs = [load_run(r) for r in demo(tmp_path / "b", {"easy": [0.2, 0.6], "hard": [0.0, 0.8]})]
    claim = judge(runs)
    noise = math.sqrt(0.5 * 0.5 / 59 + 0.6 * 0.4 / 59)
    assert claim is not None and f"worse group +0.100 ± {noise:.3f}" in claim.sentences[0]
    assert "within two standard errors: no difference is shown" in claim.sentences[1]


def test_kl_is_beside_the_claim() -> None:
    assert "PPO with KL 3.00, GIPO 2.80" in equal_kl(3.0, 2.8)
    assert "is at equal KL (within 10%)." in equal_kl(3.0, 2.8)
    assert "is NOT at equal KL" in equal_kl(3.0, 2.5) and "not known" in equal_kl(3.0, None)


def test_the_table_of_several_seeds_is_read_from_its_page(tmp_path: Path) -> None:
    runs = [load_run(r) for r in demo(tmp_path, {"easy": [0.2, 0.9], "hard": [0.0, 0.7]})]
    missing = judge(runs, tmp_path / "s2_tables.md")
    assert missing is not None and not missing.table and "no table" in missing.caption
    (tmp_path / "s2_tables.md").write_text("# Tables\n\nNot run yet.\n", encoding="utf-8")
    assert judge(runs, tmp_path / "s2_tables.md") == missing
    (tmp_path / "s2_tables.md").write_text(STUDY, encoding="utf-8")
    claim = judge(runs, tmp_path / "s2_tables.md")
    assert claim is not None and claim.caption.endswith("s2_tables.md:")
    assert claim.table == [
        ["system", "worse group", "verdict"],
        ["GIPO", "+0.150 [+0.100, +0.200]", "shown"],
        ["adaptive KL", "", "not shown: not run yet"],
    ]


def test_the_report_opens_with_the_figure_and_the_same_words(tmp_path: Path, capsys) -> None:
    runs = demo(tmp_path, {"easy": [0.2, 0.6], "hard": [0.0, 0.55]})
    report, sft = tmp_path / "report.html", str(sft_run(tmp_path / "sft"))
    assert main([*runs, "--also", sft, "--report", str(report)]) == 0
    out, page = capsys.readouterr().out, report.read_text(encoding="utf-8")
    assert "It does NOT hold on this run." in out and "final − peak" in out
    at = [page.index(words) for words in ("<img", "final − peak", "does NOT hold", "<h2>Summary")]
    assert at == sorted(at) and page.count("gold by source") == 1
    assert page.index("at equal KL") > at[2]


def test_scores_of_a_gold_model_have_no_worse_group(tmp_path: Path) -> None:
    """Its level in a source is arbitrary."""
    folders = demo(tmp_path, {"easy": [0.2, 0.9], "hard": [0.0, 0.7]})
    for folder in folders:
        with Path(folder, "recipe.yaml").open("a", encoding="utf-8") as recipe:
            recipe.write("models: {gold: {load: runs/rm_gold/final}}\n")
    runs = [load_run(folder) for folder in folders]
    assert judge(runs) is None
    header, final, *_ = table([SeedGroup(run.name, [run]) for run in runs])
    assert header == ["system", "held-out gold", "easy", "hard", "all prompts", "gap", "KL"]
    assert final[-2] == "–" and len(final) == len(header)


def test_without_gold_no_claim(tmp_path: Path, capsys) -> None:
    runs = [str(ppo_run(tmp_path / name, steps=12)) for name in ("ppo_kl", "gipo")]
    report = tmp_path / "report.html"
    assert main([*runs, "--report", str(report)]) == 0
    assert "the claim is not checked" in capsys.readouterr().out
    page = report.read_text(encoding="utf-8")
    assert "<h2>Gold" not in page and "Claim" not in page
