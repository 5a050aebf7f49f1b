"""The end of an evaluation: what is complete, what is marked, what the same command continues."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges import openai, rule
from gipo_megatron.evaluation.recipe import Statistics
from gipo_megatron.evaluation.run import conclude
from gipo_megatron.evaluation.store import ResponseStore
from gipo_megatron.evaluation.types import Response, TaskPrompt
from tests.evaluation.judge_server import Log, Reply, serving

PROMPTS = [TaskPrompt("hh", "helpful", f"p{i}", f"Q{i} ?", f"Q{i} ?", "s") for i in range(5)]


def evaluation(folder: Path, judge: dict[str, Any]) -> Any:
    """Two policies that responded to PROMPTS; as much of a recipe as the verdicts need."""
    for policy in ("gipo", "sft"):
        file = folder / "responses" / f"{policy}.jsonl"
        if not file.exists():
            rows = [Response(policy, "hh", p.prompt_id, policy, 3, True) for p in PROMPTS]
            ResponseStore(file).append(rows)
    return SimpleNamespace(
        name="small",
        run=SimpleNamespace(dir=str(folder)),
        policies={"gipo": None, "sft": None},
        subject="gipo",
        opponents=["sft"],
        models={},
        judge=judge,
        report=Statistics(bootstrap=10),
    )


def test_mostly_failed_is_not_complete_and_can_be_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All answers but those on Q0 and Q1 are cut at 50 tokens; with 100 they are whole."""
    assert openai.OpenAIJudge.name == "openai"
    log = Log()

    def script(mark: str, _: int) -> Reply:
        cut = mark not in ("Q0", "Q1") and log.bodies[-1]["max_tokens"] == 50
        return Reply("<think>Well", finish="length") if cut else Reply()

    with serving(script, log) as server:
        judge = {"name": "openai", "model": "m", "base_url": server.url, "api_key_env": ""}
        with pytest.raises(UserError) as raised:
            conclude(evaluation(tmp_path, judge | {"max_tokens": 50}), PROMPTS)
        words = "hh against sft: 2 of 5 prompts judged"
        assert words in raised.value.what and "6 failed so: (cut at max_tok" in raised.value.what
        assert raised.value.where == str(tmp_path / "results.json")
        assert json.loads((tmp_path / "results.json").read_text())["incomplete"] == [words]
        assert f"Incomplete: {words}" in (tmp_path / "report.html").read_text()
        assert f"Incomplete: {words}" in (tmp_path / "table.md").read_text()
        assert "complete;" not in capsys.readouterr().out
        conclude(evaluation(tmp_path, judge | {"max_tokens": 100}), PROMPTS)
    assert "small: complete; " in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["incomplete"] == []
    assert "Incomplete" not in (tmp_path / "report.html").read_text()
    assert log.requests == {f"Q{i}": 2 if i < 2 else 4 for i in range(5)}


def test_a_judge_of_any_kind_that_only_fails(tmp_path: Path) -> None:
    judge = {"name": rule.RuleJudge.name, "rule": "always_failed"}
    with pytest.raises(UserError, match="0 of 5 prompts judged; 10 failed so: always_failed"):
        conclude(evaluation(tmp_path, judge), PROMPTS)
