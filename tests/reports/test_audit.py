from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.audit import audit_responses
from gipo_megatron.evaluation.store import ResponseStore, write_prompts
from gipo_megatron.evaluation.types import Response, TaskPrompt
from gipo_megatron.reports.audit import (
    Audit,
    audit_run,
    last_turn,
    prompt_features,
)
from gipo_megatron.reports.audit_page import audit_document, audit_html, facts
from gipo_megatron.reports.runs import load_run
from tests.reports.synthetic import MARKUP, ppo_run, sft_run, write_rows
from tools.audit import main


def prompt(i: int, text: str, source: str = "a") -> TaskPrompt:
    return TaskPrompt("hh", "helpful", f"id{i}", text, text, source)


def answer(
    i: int, p_high: float, *, tokens: int = 5, score: float | None = None, text: str = "yes"
) -> Response:
    figures = {"p_high": p_high} | ({} if score is None else {"score": score})
    return Response("gipo", "hh", f"id{i}", text, tokens, True, figures)


def audit(values: list[float]) -> Audit:
    return audit_responses(
        [prompt(i, f"What is {i}?") for i in range(len(values))],
        [answer(i, p) for i, p in enumerate(values)],
    )


def associations(found: Audit) -> dict[str, tuple[float | None, float | None]]:
    return {a.quantity: (a.pearson, a.spearman) for a in found.associations}


def test_planted_length_is_found() -> None:
    """p_high is linear in the response's length, falls monotonically but not linearly with the
    score, and does not depend on digits."""
    lengths = list(range(10, 30))
    prompts = [prompt(i, f"Human: {'1' if i % 2 else 'x'}") for i in range(20)]
    responses = [answer(i, n / 40, tokens=n, score=math.exp(-n)) for i, n in enumerate(lengths)]
    found = associations(audit_responses(prompts, responses))
    assert found["response length"] == pytest.approx((1.0, 1.0))
    assert found["score"][1] == pytest.approx(-1.0) and found["score"][0] > -0.6
    digits = [i % 2 for i in range(20)]
    assert found["digits"][0] == pytest.approx(np.corrcoef(digits, lengths)[0, 1])
    # ties share a rank
    assert found["digits"][1] == pytest.approx(spearmanr(digits, lengths).statistic)
    assert found["prompt length"] == found["turns"] == (None, None)  # they do not vary
    assert "KL" not in found  # not measured


def test_auc_and_ami_of_sources() -> None:
    """By hand: of the 2 · 3 pairs a > b in 0.9 > {0.2, 0.8, 0.1}, 0.8 > {0.2, 0.1}, and 0.8 = 0.8
    counts one half: 5.5 / 6."""
    values, sources = [0.9, 0.2, 0.8, 0.8, 0.1], ["a", "b", "a", "b", "b"]
    found = audit_responses(
        [prompt(i, "q", s) for i, s in enumerate(sources)],
        [answer(i, p) for i, p in enumerate(values)],
    )
    assert [(s.name, s.count) for s in found.sources] == [("b", 3), ("a", 2)]
    assert (
        found.sources[1].auc
        == pytest.approx(5.5 / 6)
        == roc_auc_score([s == "a" for s in sources], values)
    )
    assert found.sources[0].auc == pytest.approx(1 - 5.5 / 6) and found.sources[
        0
    ].p_high == pytest.approx(1.1 / 3)
    assert found.source_ami == pytest.approx(adjusted_mutual_info_score(sources, [1, 0, 1, 1, 0]))
    assert (found.share_high, found.mass_high) == (0.6, pytest.approx(0.56))
    one = audit(values)
    assert one.source_ami is None and one.sources[0].auc is None


def test_entropy_by_hand() -> None:
    found = audit([0.5, 0.0, 1.0, 0.25]).entropy
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert found.mean == pytest.approx((math.log(2) + quarter) / 4)
    assert found.quantiles["50"] == pytest.approx(quarter / 2)
    # the last bin holds ln 2; quarter is 0.81 of it
    assert found.bins == [2, 0, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("values", "alarm"),
    [
        ([0.97, 0.03] * 20, ""),
        ([0.6, 0.2, 0.9, 0.1], ""),
        ([0.96] * 39 + [0.02], "collapse: the low group holds 2.5 %"),
        ([0.01] * 40, "collapse: the high group holds 0.0 %"),
        # no member, though its mass is a fifth
        ([0.2] * 40, "collapse: the high group holds 0.0 %"),
        ([0.5] * 40, "nothing learnt"),
        ([0.45, 0.55] * 20, "nothing learnt"),
        ([0.45, 0.55] * 18 + [0.99, 0.01] * 2, ""),  # a tenth is certain
    ],
)
def test_alarms(values: list[float], alarm: str) -> None:
    alarms = audit(values).alarms
    assert len(alarms) == bool(alarm) and all(a.startswith(alarm) for a in alarms)


def test_prompt_features() -> None:
    talk = "\n\nHuman: Is 7 prime?\n\nAssistant: Yes.\n\nHuman: Thank you\n\nAssistant:"
    assert last_turn(talk) == "Thank you"
    assert prompt_features(talk) == {
        "prompt length": float(len(talk)),
        "turns": 2.0,
        "question mark": 0.0,
        "digits": 0.0,
    }
    chatml = "<|im_start|>user\nAdd 2?<|im_end|>\n<|im_start|>assistant\n"
    assert last_turn(chatml) == "Add 2?" and prompt_features(chatml)["digits"] == 1.0
    assert last_turn("plain text 3?") == "plain text 3?" and prompt_features("")["turns"] == 1.0
    prompts = [prompt(0, talk), prompt(1, "thank him"), prompt(2, "¿?")]
    words = audit_responses(prompts, [answer(i, i / 4) for i in range(3)]).first_words
    assert [(w.name, w.count, w.p_high) for w in words] == [("thank", 2, 0.125), ("", 1, 0.5)]


def test_exemplars_are_the_extremes_each_prompt_once() -> None:
    values = [0.99, 0.98, 0.52, 0.3, 0.01, 0.97]
    prompts = [prompt(i, "twice" if i in (0, 1) else f"q{i}") for i in range(6)]
    found = audit_responses(prompts, [answer(i, p) for i, p in enumerate(values)]).exemplars
    assert [e.p_high for e in found["high"]] == [0.99, 0.97, 0.52]
    assert [e.p_high for e in found["low"]] == [0.01, 0.3]
    assert [e.p_high for e in found["uncertain"]] == [0.52, 0.3, 0.97, 0.98]


def test_a_run_is_audited_at_its_end(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=20))
    found = audit_run(run)
    end = [row for row in run.samples if row["step"] > 16]
    assert found.steps == (17, 20) and found.rows == len(end) == 64
    expected = np.corrcoef([row["score"] for row in end], [row["p_high"] for row in end])[0, 1]
    assert associations(found)["score"][0] == pytest.approx(expected)
    assert found.history["gap"] == run.series("groups/gap") and "flip_rate" not in found.history
    assert associations(found)["KL"][0] is not None
    assert "64 responses of steps 17–20" in facts(found)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["sources"][0]["count"] == 32


def test_the_page_shows_markup_as_text(tmp_path: Path) -> None:
    folder = ppo_run(tmp_path / "<b>", steps=6)
    rows = [
        json.loads(line) | {"groups/flip_rate": 0.1}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    write_rows(folder / "metrics.jsonl", rows)
    page = audit_html(audit_run(load_run(folder)))
    assert (
        page.count("&lt;script&gt;") >= 8
        and "<script" not in page
        and "<b>" not in page
        and MARKUP not in page
    )
    assert page.count("data:image/png;base64,") == 1 and "Flip rate" in page and "No alarm" in page
    evil = audit_responses(
        [prompt(0, "<i>\x00", "<u>"), prompt(1, "b", "&")],
        [answer(0, 0.5, text="</div>"), answer(1, 0.5)],
    )
    text = audit_document([evil, evil])
    assert (
        text.count("nothing learnt") == 2
        and "<i>" not in text
        and "<u>" not in text
        and "\x00" not in text
        and "&lt;/div&gt;" in text
    )
    assert (
        text.count("<section") == 2
        and "default-src 'none'" in text
        and "http" not in text.replace("http-equiv", "")
    )


def test_the_command(tmp_path: Path, capsys) -> None:
    runs = [
        str(ppo_run(tmp_path / name, steps=6, seed=i)) for i, name in enumerate(("gipo", "[ppo]"))
    ]
    assert main([runs[0]]) == 0 and main([*runs, f"out={tmp_path}/both"]) == 0
    printed = capsys.readouterr().out
    assert "Spearman: score" in printed and "AUC: harmless" in printed and "[ppo]" in printed
    assert len(json.loads((tmp_path / "gipo/audit.json").read_text())) == 1
    assert [a["name"] for a in json.loads((tmp_path / "both/audit.json").read_text())] == [
        "gipo",
        "[ppo]",
    ]
    assert (tmp_path / "both/audit.html").read_text().count("<section") == 2


def test_the_command_reads_an_evaluation(tmp_path: Path, capsys) -> None:
    write_prompts(tmp_path / "prompts.jsonl", [prompt(i, f"q{i}") for i in range(4)])
    ResponseStore(tmp_path / "responses/gipo.jsonl").append([answer(i, 0.5) for i in range(4)])
    ResponseStore(tmp_path / "responses/sft.jsonl").append(
        [Response("sft", "hh", "id0", "no", 1, True)]
    )
    with (tmp_path / "responses/gipo.jsonl").open("a") as file:
        file.write('{"policy": "gi')  # killed while writing
    assert main([str(tmp_path)]) == 0
    assert "ALARM nothing learnt" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "audit.json").read_text())
    assert (found["name"], found["rows"], found["steps"], found["history"]) == ("gipo", 4, None, {})
    with (tmp_path / "responses/gipo.jsonl").open("a") as file:
        file.write('\n{"policy": "gipo"}\n')
    assert main([str(tmp_path)]) == 2
    assert "gipo.jsonl:6" in capsys.readouterr().err


def test_mistakes_exit_2_on_one_screen(tmp_path: Path, capsys) -> None:
    three = ppo_run(tmp_path / "three", steps=2)
    write_rows(
        three / "metrics.jsonl",
        [{"step": 1, "groups/share_0": 0.3, "groups/share_1": 0.3, "groups/share_2": 0.4}],
    )
    cases = [
        [],
        [str(tmp_path / "nope")],
        [str(sft_run(tmp_path / "sft"))],
        ["--x"],
        ["outt=x"],
        [str(three)],
    ]
    for arguments in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and 0 < len(error.splitlines()) <= 5 and "fix:" in error
    assert len(cases) == 6 and main(["--help"]) == 0
    with pytest.raises(UserError, match="two groups"):
        audit_run(load_run(three))
    with pytest.raises(UserError, match="no prompt 'id0'"):
        audit_responses([], [answer(0, 0.5)])
    with pytest.raises(UserError, match=r"models\.critic"):
        audit_responses([prompt(0, "q")], [Response("sft", "hh", "id0", "no", 1, True)])
