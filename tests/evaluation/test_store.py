from __future__ import annotations

import json
from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.store import ResponseStore, VerdictStore, write_prompts
from gipo_megatron.evaluation.types import (
    FAILED,
    FIRST,
    TIE,
    PairOrder,
    Response,
    TaskPrompt,
    Verdict,
)


def response(prompt_id: str, text: str = "x") -> Response:
    return Response("gipo", "hh", prompt_id, text, 3, True, {"score": 0.5, "kl": -1.25})


ODD = 'two\nlines\u2028"quoted" <script> \ud800 \x00 é'


def test_what_was_appended_is_read_by_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "responses" / "gipo.jsonl"
    store = ResponseStore(file)
    assert store.done == set() and not file.exists()
    store.append([response("a", ODD), response("b")])
    store.append([response("c")])
    again = ResponseStore(file)
    assert store.done == again.done == {"a", "b", "c"}
    assert again.read() == [response("a", ODD), response("b"), response("c")]
    assert len(file.read_bytes().splitlines()) == 4


def test_killed_at_any_byte_only_the_torn_line_is_lost(tmp_path: Path) -> None:
    """The file is cut at every byte of a write; a restart answers what is missing, and the file is
    as if nothing had happened."""
    whole = tmp_path / "whole.jsonl"
    ResponseStore(whole).append([response("a", ODD), response("b")])
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    for size in range(len(content)):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(content[:size])
        store = ResponseStore(torn)
        assert len(store.done) == max(0, sum(end <= size for end in ends) - 1)
        store.append(
            [r for r in (response("a", ODD), response("b")) if r.prompt_id not in store.done]
        )
        assert torn.read_bytes() == content
    assert size == len(content) - 1 > 200


def test_another_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    order = PairOrder("hh", "sft", "a", True)
    VerdictStore(file, "judge 1, margin 1.0").append({order: Verdict(TIE)})
    before = file.read_bytes()
    for store in (lambda: VerdictStore(file, "judge 2, margin 1.0"), lambda: ResponseStore(file)):
        with pytest.raises(UserError, match=r"a\.jsonl was made by other") as raised:
            store()
        assert "choose another run.dir" in raised.value.fix and file.read_bytes() == before


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    broken = {
        b'{"policy": "x"\n': "unreadable line",
        b"[1]\n": "a JSON list",
        b'{"policy": "x"}\n': "not a response",
    }
    for line, said in broken.items():
        file.write_bytes(b'{"key": ""}\n' + line)
        with pytest.raises(UserError, match=said) as raised:
            ResponseStore(file)
        assert raised.value.where == f"{file}:2"
    assert len(broken) == 3


def test_a_prompt_answered_twice_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    ResponseStore(file).append([response("a", "first"), response("a", "second")])
    assert [r.text for r in ResponseStore(file).read()] == ["first"]


def test_verdicts_by_order_the_last_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    one, other = (PairOrder("hh", "sft", "a", first) for first in (True, False))
    store = VerdictStore(file)
    store.append({one: Verdict(FAILED, "timed out"), other: Verdict(TIE, "equal", 7, 2, True)})
    store.append({one: Verdict(FIRST, "A. [[A]]")})
    found = VerdictStore(file).read()
    assert found == {one: Verdict(FIRST, "A. [[A]]"), other: Verdict(TIE, "equal", 7, 2, True)}
    with open(file, "ab") as torn:
        torn.write(b'{"task": "hh", "oppo')
    assert VerdictStore(file).read() == found
    # the keys on disk
    assert json.loads(file.read_text().splitlines()[1]) == {
        "task": "hh",
        "baseline": "sft",
        "prompt_id": "a",
        "model_first": True,
        "choice": FAILED,
        "text": "timed out",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cached": False,
    }


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write"):
        ResponseStore(tmp_path / "file" / "a.jsonl").append([response("a")])


def test_prompts_are_plain_lines(tmp_path: Path) -> None:
    prompts = [
        TaskPrompt("hh", "helpful", "0", ODD, "q", "s"),
        TaskPrompt("hh", "helpful", "1", "t", "q", "s", "ref"),
    ]
    for _ in range(2):
        write_prompts(tmp_path / "prompts.jsonl", prompts)
    rows = [
        TaskPrompt(**json.loads(line))
        for line in (tmp_path / "prompts.jsonl").read_bytes().splitlines()
    ]
    assert rows == prompts and [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]
