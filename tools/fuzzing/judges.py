"""Answers of a judge: what a server sends, the raters' exports, and the files that keep answers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
from hypothesis import strategies as st

from gipo_megatron import cli
from gipo_megatron.evaluation import chat_requests
from gipo_megatron.evaluation.judges.human import HumanJudge
from gipo_megatron.evaluation.judges.openai import CACHE, OpenAIJudge
from gipo_megatron.evaluation.store import ResponseStore, VerdictStore
from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Pair, PairOrder, Verdict
from gipo_megatron.http_client import HttpClient
from tools.fuzzing.case import Fault, Screen, check, fill, observed
from tools.fuzzing.values import as_json, damaged, hostile, mutated

PAIRS = [Pair("task", "helpful", f"id{i}", f"Q{i}?", f"one {i}", f"two {i}") for i in range(2)]


@dataclass(frozen=True)
class Answer:
    """A server's answer to each request, and files that are there before."""

    status: int
    headers: dict[str, str]
    body: bytes
    form: str = "text"
    files: dict[str, bytes] = field(default_factory=dict)
    action: str = "server"  # ACTIONS has the others

    @property
    def words(self) -> tuple[str, ...]:
        return (self.action, str(self.status), repr(self.headers), repr(self.body))


# ------------------------------------------------------------------------------------- what is done


def judge_of(answer: Answer) -> OpenAIJudge:
    return OpenAIJudge(
        model="judge",
        base_url="http://judge.invalid/v1",
        api_key_env="",
        answer=answer.form,
        concurrency=1,
        retries=1,
        backoff=0.0,
        timeout=5.0,
        directory=".",
    )


def ask(answer: Answer) -> int:
    """Request two verdicts, then read all that was kept of them again."""

    def handle(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(answer.status, headers=answer.headers, content=answer.body)

    def unasked(_: httpx2.Request) -> httpx2.Response:
        raise Fault("a kept answer is requested again")

    found = []
    for handler in (handle, unasked):
        client = partial(HttpClient, transport=httpx2.MockTransport(handler))
        with patch.object(chat_requests, "HttpClient", client):
            judge = judge_of(answer)
            verdicts = judge.judge(PAIRS, lambda count: None)
        json.dumps(judge.about(), allow_nan=False)
        found.append([verdict.choice for verdict in verdicts if verdict is not None])
        if not {*found[-1]} <= {FIRST, SECOND, TIE, FAILED} or len(found[-1]) != len(PAIRS):
            raise Fault(f"verdicts {found[-1]}")
        if any(verdict is not None and "no answer after" in verdict.text for verdict in verdicts):
            break  # such a request is sent again by design
    if found[0] != found[-1]:
        raise Fault(f"verdicts {found[0]}, read again {found[1]}")
    store = VerdictStore("verdicts.jsonl", "key")
    kept = {PairOrder("t", "b", f"id{i}", True): v for i, v in enumerate(verdicts) if v}
    store.append(kept)
    if {key: v.choice for key, v in store.read().items()} != {k: v.choice for k, v in kept.items()}:
        raise Fault("verdicts are read otherwise than written")
    return 0


def read_cache(answer: Answer) -> int:
    judge = judge_of(answer)
    json.dumps(judge.about(), allow_nan=False)
    return 0


def read_verdicts(_: Answer) -> int:
    for verdict in VerdictStore("verdicts.jsonl", "key").read().values():
        _types(verdict, choice=str, text=str, prompt_tokens=int)
    return 0


def read_responses(_: Answer) -> int:
    for response in ResponseStore("responses.jsonl").read():
        _types(response, text=str, tokens=int, figures=dict)
    return 0


def _types(value: Any, **types: type) -> None:
    for name, kind in types.items():
        if type(getattr(value, name)) is not kind:
            raise Fault(f"{name} is {getattr(value, name)!r}")


def read_ratings(_: Answer) -> int:
    judge = HumanJudge(raters=["ann"], pairs=2, directory=".", ratings=["ann.json"])
    judge.judge(PAIRS, lambda count: None)
    json.dumps(judge.about())
    return 0


ACTIONS: dict[str, Callable[[Answer], int]] = {
    "server": ask,
    "cache": read_cache,
    "verdicts": read_verdicts,
    "responses": read_responses,
    "ratings": read_ratings,
}
# action -> the place that a refusal names
NAMES: dict[str, tuple[str, ...]] = {
    "server": ("judge.base_url",),
    "cache": (CACHE,),
    "verdicts": ("verdicts.jsonl",),
    "responses": ("responses.jsonl",),
    "ratings": ("ann.json", "key.json"),
}


def run(answer: Answer, folder: Path) -> Screen:
    """Read the answer as an evaluation does; raise Fault for a broken rule."""
    fill(folder, answer.files)
    screen = observed(lambda: cli.run(partial(ACTIONS[answer.action], answer)), folder)
    check(screen, NAMES[answer.action])
    return screen


# ------------------------------------------------------------------------------------ what is drawn

VERDICTS = st.sampled_from(
    ["[[A]]", "x [[B]]", '{"explanation": "e", "verdict": "A"}', '{"verdict": ["A"]}',
     "<think>[[A]]", "<think>a</think>[[B]]", "[[A]] [[B]]", "{" * 3000, '{"a":' * 3000,
     "[[", "", "[[D]]", "no",
     '{"verdict": "A"', "\ud800[[A]]", "[[A]]" * 999, '{"explanation": "[[A]]', "\x1b[2J[[A]]"]
)  # fmt: skip


def completion(content: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "reasoning_content": None, "refusal": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "x", "object": "chat.completion", "choices": choices, "usage": usage}


def events(content: str) -> bytes:
    """Return a stream of events."""
    parts = [{"choices": [{"delta": {"content": part}}]} for part in (content[:3], content[3:])]
    parts.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    lines = [b"data: " + as_json(part) + b"\n\n" for part in parts]
    return b"".join(lines) + b"data: [DONE]\n\n"


ERROR = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
WORDS = ["max_tokens", "temperature", "schema", "too long", "content_filter", "quota", "role", "x"]
HEADERS = [
    {}, {}, {"retry-after": "0.001"}, {"retry-after": "x"}, {"retry-after": "nan"},
    {"retry-after": "inf"}, {"retry-after": "-1"}, {"retry-after": "1e308"},
    {"retry-after-ms": "Wed, 99 Foo"}, {"content-type": "text/html"}, {"content-type": "\u00ff"},
    {"content-encoding": "gzip"}, {"content-type": "application/json; charset=nope"},
]  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """An answer of a server, with any status."""
    form, headers = draw(st.sampled_from(["text", "json"])), draw(st.sampled_from(HEADERS))
    kind = draw(st.sampled_from(["value", "value", "value", "bytes", "events", "error", "any"]))
    status = 200
    body = as_json(completion(draw(VERDICTS)))
    if kind == "value":
        body = as_json(draw(mutated(completion(draw(VERDICTS))))[0])
    elif kind == "bytes":
        body = draw(damaged(body))
    elif kind == "events":
        body = events(draw(VERDICTS))
        body = draw(st.one_of(st.just(body), damaged(body)))
    elif kind == "error":
        status = draw(st.sampled_from([200, 301, 400, 401, 404, 413, 422, 429, 500, 503]))
        error = {**ERROR["error"], "message": draw(st.sampled_from(WORDS))}
        body = as_json(draw(mutated({"error": error}))[0])
        body = draw(st.one_of(st.just(body), damaged(body)))
    else:
        body = as_json(draw(hostile()))
    return Answer(status, headers, body, form)


REPLY = {
    "request": "ab",
    "model": "judge",
    "body": completion("[[A]]"),
    "max_tokens": 9,
    "changes": ["no temperature"],
}
VERDICT = {**PairOrder("t", "b", "id", True)._asdict(), **vars(Verdict(FIRST, "x", 1, 2))}
RESPONSE = {
    "policy": "p",
    "task": "t",
    "prompt_id": "id",
    "text": "x",
    "tokens": 3,
    "finished": True,
    "figures": {"score": 0.5},
}
LINES: dict[str, tuple[str, str, Any]] = {  # action -> file, key, row
    "cache": (CACHE, "judge replies 2", REPLY),
    "verdicts": ("verdicts.jsonl", "key", VERDICT),
    "responses": ("responses.jsonl", "", RESPONSE),
}


@st.composite
def kept(draw: st.DrawFn) -> Answer:
    """A file of answers with a changed line."""
    action = draw(st.sampled_from([*LINES]))
    name, key, row = LINES[action]
    rows = [{"key": key}, row, draw(mutated(row))[0], row]
    content = b"".join(as_json(value) + b"\n" for value in rows)
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
    return Answer(200, {}, b"", files={name: content}, action=action)


def study() -> dict[str, bytes]:
    """Return the key of a rater's page and the rater's export, as files."""
    with tempfile.TemporaryDirectory() as folder:
        judge = HumanJudge(raters=["ann"], pairs=2, directory=folder)
        judge.write_pages(PAIRS)
        home = judge.folder.relative_to(folder)
        key = (judge.folder / "key.json").read_bytes()
    about = json.loads(key)
    ratings = [{"pair": pair, "choice": "left"} for pair in about["raters"]["ann"]]
    export = {
        "format": about["format"],
        "study": about["study"],
        "rater": "ann",
        "ratings": ratings,
    }
    return {f"{home}/key.json": key, "ann.json": as_json(export)}


@st.composite
def ratings(draw: st.DrawFn, files: dict[str, bytes]) -> Answer:
    """A rater's export, or the key of the pages, with changed values or bytes."""
    name = draw(st.sampled_from([*files]))
    content = as_json(draw(mutated(json.loads(files[name])))[0])
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(files[name]))
    return Answer(200, {}, b"", files={**files, name: content}, action="ratings")


def cases() -> st.SearchStrategy[Answer]:
    return st.one_of(answers(), answers(), answers(), kept(), ratings(study()))
