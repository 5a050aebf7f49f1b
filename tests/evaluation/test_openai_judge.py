"""The openai judge against a real HTTP server: nothing lost, nothing asked twice, every failure
counted."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from gipo_megatron import registry
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges import prompts
from gipo_megatron.evaluation.judges.openai import CACHE, OpenAIJudge
from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, TIE, Pair, Verdict
from tests.evaluation.judge_server import TOKENS, Log, Reply, Script, refusal, serving

KEY = "sk-never-to-be-seen-0123456789"
GOOD = Reply()
SETTINGS = {
    "model": "judge-1",
    "api_key_env": "TEST_JUDGE_KEY",
    "answer": "text",
    "timeout": 60.0,
    "retries": 3,
    "backoff": 0.02,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def pair(i: int, kind: str = "helpful") -> Pair:
    return Pair(
        "task", kind, f"id{i}", f"Q{i} what?", f"first answer to {i}", f"second answer to {i}"
    )


def pairs(count: int) -> list[Pair]:
    return [pair(i) for i in range(count)]


def judge_at(url: str, folder: Path, **changed: object) -> OpenAIJudge:
    return OpenAIJudge(**{**SETTINGS, "base_url": url, "directory": folder, **changed})  # type: ignore[arg-type]


def ask(judge: OpenAIJudge, comparisons: list[Pair]) -> list[Verdict]:
    told: list[int] = []
    verdicts = judge.judge(comparisons, told.append)
    assert len(verdicts) == sum(told) == len(comparisons)
    return verdicts


def one(script: Script, folder: Path, **changed: object) -> tuple[Verdict, Log, OpenAIJudge]:
    log = Log()
    with serving(script, log) as server:
        judge = judge_at(server.url, folder, **changed)
        return ask(judge, [pair(1)])[0], log, judge


# ------------------------------------------------------------------------------------------ answers


def test_answers_come_back_in_order_and_are_paid_once(tmp_path: Path) -> None:
    said = ["Better: [[A]]", "I first thought [[A]], but no.\n[[B]]", "[[C]]", "**[[B]]** it is"]
    expected = [FIRST, SECOND, TIE, SECOND]
    log = Log()
    with serving(
        lambda mark, _: Reply(said[int(mark[1:]) % 4], delay=0.02 * (3 - int(mark[1:]) % 4)), log
    ) as server:
        judge = judge_at(server.url, tmp_path)
        verdicts = ask(judge, pairs(12))
        assert [v.choice for v in verdicts] == expected * 3
        assert [v.text for v in verdicts] == said * 3 and not any(v.cached for v in verdicts)
        assert {(v.prompt_tokens, v.completion_tokens) for v in verdicts} == {(100, 10)}
        again = judge_at(server.url, tmp_path)
        repeated = ask(again, pairs(12))
    assert [v.choice for v in repeated] == expected * 3 and all(v.cached for v in repeated)
    assert log.requests == log.answered == Counter({f"Q{i}": 1 for i in range(12)})
    about = again.about()
    assert (about["answers"], about["prompt_tokens"], about["completion_tokens"]) == (
        12,
        12 * 100,
        12 * 10,
    )
    assert about["this_run"] == {"answered": 0, "from_cache": 12, "failed": 0, "attempts": 0}
    assert judge.about()["this_run"] == {
        "answered": 12,
        "from_cache": 0,
        "failed": 0,
        "attempts": 12,
    }


def test_what_is_sent(tmp_path: Path) -> None:
    _, log, _ = one(lambda *_: GOOD, tmp_path, temperature=0.25, max_tokens=77)
    _, bare, _ = one(lambda *_: GOOD, tmp_path, temperature=None, max_tokens=0)
    expected: dict[str, object] = {
        "model": "judge-1",
        "messages": prompts.messages(pair(1), "text"),
    }
    assert log.bodies == [{**expected, "temperature": 0.25, "max_tokens": 77}]
    assert bare.bodies == [expected], (
        "another setting is another request, and null leaves a setting to the server"
    )
    assert log.keys == {f"Bearer {KEY}"}


THOUGHT = "First [[B]], then again [[B]]."
PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
    {"type": "reasoning", "text": THOUGHT},
    {"type": "text", "text": "A is "},
    {"type": "text", "text": "fuller.\n[[A]]"},
]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(PARTS),
        Reply("Good.\n[[A]]", more={"reasoning_content": THOUGHT}),
        Reply("Good.\n[[A]]", more={"reasoning": THOUGHT}, finish=None),
        Reply(None, more={"reasoning_content": f"{THOUGHT} So:\n**[[A]]**"}),
        Reply(f"<think>\n{THOUGHT}</think>\n[[A]]"),
        Reply(f"{THOUGHT}\n</think>\n\n[[A]]"),  # the tag that opens was in the template
        Reply(f"[THINK]{THOUGHT}[/THINK][[A]]"),
        Reply(f"<seed:think>{THOUGHT}</seed:think>[[A]]"),
        Reply("B shows its <think> tag.\n[[A]]"),
    ],
    ids=str,
)
def test_thoughts_are_no_answer(tmp_path: Path, reply: Reply) -> None:
    verdict, log, _ = one(lambda *_: reply, tmp_path)
    assert verdict.choice == FIRST and log.requests["Q1"] == 1


def test_a_cut_answer_is_bought_again_with_another_limit_only(tmp_path: Path) -> None:
    """Q1 is cut at 50 tokens. With 100, it alone is asked again; all that was paid is counted."""
    log = Log()

    def script(mark: str, _: int) -> Reply:
        short = log.bodies[-1]["max_tokens"] == 50
        return Reply("<think>[[B]]", finish="length") if mark == "Q1" and short else GOOD

    with serving(script, log) as server:
        first = ask(judge_at(server.url, tmp_path, max_tokens=50), pairs(3))
        again = judge_at(server.url, tmp_path, max_tokens=100)
        second = ask(again, pairs(3))
    assert [v.choice for v in first] == [FIRST, FAILED, FIRST]
    assert [v.choice for v in second] == [FIRST] * 3
    assert log.requests == Counter(Q0=1, Q1=2, Q2=1)
    assert again.about()["completion_tokens"] == 4 * 10


# ------------------------------------------------------------------- settings that a server refuses

TEMPERATURE = "Unsupported value: 'temperature' does not support 0.0 with this model."


@pytest.mark.parametrize(
    ("refused", "message", "status"),
    [
        ("system", "System role not supported", 400),
        ("system", "Conversation roles must alternate user/assistant/user/assistant/...", 500),
        ("system", "Developer instruction is not enabled for models/gemma-3-27b-it", 400),
        ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model", 400),
        ("temperature", TEMPERATURE, 400),
        ("temperature", "body.temperature: Extra inputs are not permitted", 422),
    ],
)
def test_a_refused_setting_is_changed_once_for_the_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: str,
    message: str,
    status: int,
) -> None:
    log = Log()

    def script(mark: str, _: int) -> Reply:
        body = log.bodies[-1]
        roles = [message["role"] for message in body["messages"]]
        return refusal(status, message) if refused in (*body, *roles) else GOOD

    with serving(script, log) as server:
        judge = judge_at(server.url, tmp_path)
        assert {v.choice for v in ask(judge, pairs(6))} == {FIRST}
        again = judge_at(server.url, tmp_path)
        assert all(v.cached for v in ask(again, pairs(6)))
    assert sum(log.requests.values()) == 6 + 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert len(again.about()["changes"]) == 1 and again.about()["changes"][0] in lines[0]
    system, user = (message["content"] for message in prompts.messages(pair(1), "text"))
    sent = next(b for b in log.bodies[1:] if "Q1 what?" in b["messages"][-1]["content"])
    expected = {
        "system": {"messages": [{"role": "user", "content": f"{system}\n\n{user}"}]},
        "max_tokens": {"max_completion_tokens": 1024},
        "temperature": {},
    }[refused]
    whole = {"messages": prompts.messages(pair(1), "text"), "temperature": 0.0, "max_tokens": 1024}
    kept = {key: value for key, value in whole.items() if key != refused}
    assert sent == {"model": "judge-1", **kept, **expected}


def test_several_refused_settings_and_one_that_cannot_be_left_out(tmp_path: Path) -> None:
    """max_tokens, then its other name too: the server's words end it, after two requests."""

    def script(*_: object) -> Reply:
        name = "max_tokens" if "max_tokens" in log.bodies[-1] else "max_completion_tokens"
        return refusal(400, f"'{name}' is above 16: a 'max_tokens' of 16 is accepted")

    log = Log()
    with serving(script, log) as server, pytest.raises(UserError, match="is above 16"):
        judge_at(server.url, tmp_path).judge(pairs(5), lambda _: None)
    assert sum(log.requests.values()) == 2


def test_one_refused_text_fails_alone_and_changes_nothing(tmp_path: Path) -> None:
    """After an answer the settings are right: a 400 that names a role is this text's."""
    log = Log()
    with serving(
        lambda mark, _: refusal(400, "bad role in the text") if mark == "Q2" else GOOD, log
    ) as server:
        verdicts = ask(judge_at(server.url, tmp_path), pairs(4))
        again = judge_at(server.url, tmp_path)
        assert ask(again, pairs(4))[2].choice == FAILED and again.about()["changes"] == []
    assert [v.choice for v in verdicts] == [FIRST, FIRST, FAILED, FIRST]
    assert "HTTP 400: bad role in the text" in verdicts[2].text
    assert log.requests == Counter({f"Q{i}": 1 for i in range(4)})


def test_the_same_pair_twice_is_asked_once(tmp_path: Path) -> None:
    log = Log()
    with serving(lambda *_: GOOD, log) as server:
        verdicts = ask(judge_at(server.url, tmp_path), [pair(1), pair(2), pair(1)])
    assert [v.choice for v in verdicts] == [FIRST] * 3 and [v.cached for v in verdicts] == [
        False,
        False,
        True,
    ]
    assert log.requests == Counter(Q1=1, Q2=1)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("Both are fine."), "no verdict; finish_reason stop"),
        (Reply("<think>Perhaps [[B]], or [[A]] but"), "a larger judge.max_tokens"),
        (Reply("", more={"reasoning": "[[A]]? No"}, finish="length"), "a larger judge.max_tokens"),
        (Reply(None, more={"refusal": "I do not judge. [[A]]"}), "the model refused"),
        (Reply(""), "no verdict"),
        (Reply(body=b'{"choices": []}'), "no verdict"),
        (Reply(body=b'{"choices": null, "usage": null}'), "no verdict"),
        (Reply(body=b'{"choices": [{"message": "?"}], "usage": {"prompt_tokens": "x"}}'), "no v"),
        (Reply("[[D]] [A] [[a]] [[rating]]"), "no verdict"),
        (Reply(None, finish="content_filter"), "finish_reason content_filter"),
        (Reply("A seems [[A]], on the oth", finish="length"), "cut at max_tokens"),
        (
            Reply(status=400, body=b'{"error": {"message": "filtered", "code": "content_filter"}}'),
            "HTTP 400: filtered",
        ),
        (
            Reply(
                status=400,
                body=b'{"error": {"message": "maximum context length is 8", "code": 400}}',
            ),
            "maximum context length",
        ),
        (refusal(400, "The input (9000 tokens) is longer than 8192 tokens"), "longer than"),
        (refusal(413, "prompt is too long: 210000 tokens > 200000 maximum"), "too long"),
        (refusal(400, "exceeds the available context size"), "context size"),
    ],
)
def test_an_answer_without_a_verdict_is_failed_kept_and_not_paid_again(
    tmp_path: Path, reply: Reply, said: str
) -> None:
    log = Log()
    with serving(lambda *_: reply, log) as server:
        for _ in range(2):
            judge = judge_at(server.url, tmp_path)
            (verdict,) = ask(judge, [pair(1)])
            assert (
                verdict.choice == FAILED
                and said in verdict.text
                and judge.about()["this_run"]["failed"] == 1
            )
    assert log.requests["Q1"] == 1


# ------------------------------------------------------------------------------- trouble on the way


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=500),
        Reply(status=503, body=b"<html>busy</html>"),
        Reply(status=429),
        Reply(status=429, headers={"Retry-After": "soon"}),
        Reply(delay=3.0),
        Reply(drop="before"),
        Reply(drop="amid"),
        Reply(drop="trickle"),
        Reply(body=b'{"error": {"message": "Provider returned error", "code": 502}}'),
        Reply(body=b"\xff\xfe", headers={"Content-Encoding": "gzip"}),
    ],
    ids=str,
)
def test_passing_trouble_is_tried_again(tmp_path: Path, trouble: Reply) -> None:
    verdict, log, judge = one(lambda _, n: trouble if n < 3 else GOOD, tmp_path, timeout=1.5)
    assert (
        verdict.choice == FIRST
        and log.requests["Q1"] == 3
        and judge.about()["this_run"]["attempts"] == 3
    )
    assert judge.about()["answers"] == 1


def test_retry_after_is_honoured_as_seconds_and_as_a_date(tmp_path: Path) -> None:
    _, log, _ = one(
        lambda _, n: Reply(status=429, headers={"Retry-After": "0.5"}) if n == 1 else GOOD,
        tmp_path / "a",
    )
    first, second = log.times["Q1"]
    assert 0.5 <= second - first < 30
    until = int(time.time()) + 3
    date = email.utils.formatdate(until, usegmt=True)
    _, log, _ = one(
        lambda _, n: Reply(status=503, headers={"Retry-After": date}) if n == 1 else GOOD,
        tmp_path / "b",
    )
    first, second = log.times["Q1"]
    assert second - time.monotonic() + time.time() >= until - 0.1  # not before it


@pytest.mark.parametrize(
    "value", ["-5", "nan", "0", "", "Mon, 01 Jan 2001 00:00:00 GMT", "Mon, 99 Jan 2001", "soon"]
)
def test_a_retry_after_without_a_sense_is_left_out(tmp_path: Path, value: str) -> None:
    busy = Reply(status=429, headers={"Retry-After": value})
    verdict, log, _ = one(lambda _, n: busy if n == 1 else GOOD, tmp_path)
    assert verdict.choice == FIRST and log.requests["Q1"] == 2


@pytest.mark.parametrize(
    "value", ["86400", "121", "1e400", "inf", email.utils.formatdate(4e9, usegmt=True)]
)
def test_a_wait_that_is_too_long_ends_it_at_once(tmp_path: Path, value: str) -> None:
    log = Log()
    busy = Reply(status=429, headers={"Retry-After": value})
    with (
        serving(lambda mark, _: GOOD if mark == "Q0" else busy, log) as server,
        pytest.raises(UserError, match=r"requests a wait of .*HTTP 429") as raised,
    ):
        judge_at(server.url, tmp_path, concurrency=1).judge(pairs(5), lambda _: None)
    assert log.requests == Counter(Q0=1, Q1=1) and "1 answers are kept" in raised.value.fix


def test_a_wait_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one(lambda _, n: Reply(status=429) if n == 1 else GOOD, tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("openai: HTTP 429: scripted 429; attempt 2 in 0.0")


@pytest.mark.parametrize("more", [{"code": "insufficient_quota"}, {"type": "exceeded_quota_error"}])
def test_a_spent_quota_is_no_rate_limit(tmp_path: Path, more: dict[str, str]) -> None:
    log, spent = Log(), refusal(429, "You exceeded your current quota", **more)
    with serving(lambda mark, _: GOOD if mark in ("Q0", "Q1") else spent, log) as server:
        with pytest.raises(UserError, match="exceeded your current quota") as raised:
            judge_at(server.url, tmp_path, concurrency=1).judge(pairs(9), lambda _: None)
        server.script = lambda *_: GOOD
        verdicts = ask(judge_at(server.url, tmp_path), pairs(9))
    assert "raise the account's quota" in raised.value.fix
    assert [v.cached for v in verdicts] == [True] * 2 + [False] * 7
    assert log.requests == Counter({f"Q{i}": 2 if i == 2 else 1 for i in range(9)})


def test_backoff_doubles_with_jitter(tmp_path: Path) -> None:
    _, log, _ = one(lambda _, n: Reply(status=500) if n < 4 else GOOD, tmp_path, backoff=0.2)
    gaps = [b - a for a, b in zip(log.times["Q1"], log.times["Q1"][1:], strict=False)]
    assert len(gaps) == 3
    for gap, base in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert base / 2 <= gap < base + 1.5  # a loaded machine adds, and takes nothing away


def test_one_prompt_that_never_works_is_failed_and_asked_again_next_time(tmp_path: Path) -> None:
    healthy, log = False, Log()
    with serving(
        lambda mark, _: Reply(status=500) if mark == "Q3" and not healthy else GOOD, log
    ) as server:
        judge = judge_at(server.url, tmp_path, retries=2, concurrency=2)
        verdicts = ask(judge, pairs(8))
        assert [v.choice for v in verdicts] == [FAILED if i == 3 else FIRST for i in range(8)]
        assert verdicts[3].text == "no answer after 3 attempts: HTTP 500: scripted 500"
        assert judge.about()["this_run"] == {
            "answered": 7,
            "from_cache": 0,
            "failed": 1,
            "attempts": 7 + 3,
        }
        healthy = True
        assert all(v.choice == FIRST for v in ask(judge_at(server.url, tmp_path), pairs(8)))
    assert log.requests == Counter({f"Q{i}": 4 if i == 3 else 1 for i in range(8)})


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 301])
def test_what_no_retry_mends_ends_with_the_servers_words(tmp_path: Path, status: int) -> None:
    log, words = (
        Log(),
        json.dumps({"error": {"message": f"no such model; you sent {KEY}", "code": None}}).encode(),
    )
    with (
        serving(lambda *_: Reply(status=status, body=words), log) as server,
        pytest.raises(UserError) as raised,
    ):
        judge_at(server.url, tmp_path, concurrency=1).judge(pairs(5), lambda _: None)
    assert f"HTTP {status}: no such model" in raised.value.what and KEY not in str(raised.value)
    assert sum(log.requests.values()) == 1


PAGES = [b"<html>Welcome</html>", b'{"error": "Unexpected endpoint"}', b"[]", b"data: {}\n\n", b""]


@pytest.mark.parametrize("page", PAGES)
def test_an_address_without_chats_ends_it_at_once(tmp_path: Path, page: bytes) -> None:
    log = Log()
    with (
        serving(lambda *_: Reply(body=page), log) as server,
        pytest.raises(UserError, match="no chat completion") as raised,
    ):
        judge_at(server.url, tmp_path).judge(pairs(9), lambda _: None)
    assert "judge.base_url" in raised.value.where and sum(log.requests.values()) == 1


@pytest.mark.parametrize("page", PAGES)
def test_after_an_answer_a_page_is_tried_again(tmp_path: Path, page: bytes) -> None:
    log = Log()
    with serving(lambda m, n: Reply(body=page) if m == "Q1" and n == 1 else GOOD, log) as server:
        assert {v.choice for v in ask(judge_at(server.url, tmp_path), pairs(2))} == {FIRST}
    assert log.requests == Counter(Q0=1, Q1=2)


def test_bounded_concurrency(tmp_path: Path) -> None:
    log = Log()
    with serving(lambda *_: Reply(delay=0.1), log) as server:
        ask(judge_at(server.url, tmp_path, concurrency=3), pairs(12))
    assert log.most_in_flight == 3 and sum(log.requests.values()) == 12


# ------------------------------------------------------------------------------------------- deaths


def test_a_server_that_dies_midway_and_comes_back(tmp_path: Path) -> None:
    """It answers ten, then hangs up on everybody. What it answered is kept; the next run asks for
    the rest."""
    log = Log()
    with serving(lambda *_: GOOD, log) as server:
        url, port = server.url, server.server_address[1]

        def dying(mark: str, _: int) -> Reply:
            if len(log.requests) > 10 and not server.dead:
                server.die()
            return Reply(delay=0.01)

        server.script = dying
        with pytest.raises(UserError, match="does not answer") as raised:
            judge_at(url, tmp_path, concurrency=4).judge(pairs(30), lambda _: None)
    kept = sum(log.answered.values())
    assert 6 <= kept <= 10 and f"{kept} answers are kept" in raised.value.fix
    with serving(lambda *_: GOOD, log, port) as server:
        assert server.url == url
        verdicts = ask(judge_at(url, tmp_path, concurrency=4), pairs(30))
    assert [v.choice for v in verdicts] == [FIRST] * 30
    assert sum(v.cached for v in verdicts) == kept
    assert log.answered == Counter({f"Q{i}": 1 for i in range(30)}), (
        "each answered once, over both lives of the server"
    )


def test_a_server_that_only_fails_is_given_up(tmp_path: Path) -> None:
    log = Log()
    with (
        serving(lambda *_: Reply(status=500), log) as server,
        pytest.raises(UserError, match=r"does not answer.*scripted 500"),
    ):
        judge_at(server.url, tmp_path, concurrency=2, retries=1).judge(pairs(50), lambda _: None)
    assert sum(log.requests.values()) <= 2 * (4 + 1)  # four given up, one more in flight


def test_a_stopping_run_waits_for_no_retry(tmp_path: Path) -> None:
    """Q2's key is refused while Q1 was told to come back in a minute and 59 seconds."""
    log = Log()
    script = {
        "Q0": GOOD,
        "Q1": Reply(status=429, headers={"Retry-After": "119"}),
        "Q2": Reply(status=401, delay=0.2),
    }
    with (
        serving(lambda mark, _: script[mark], log) as server,
        pytest.raises(UserError, match="HTTP 401"),
    ):
        judge_at(server.url, tmp_path, concurrency=2).judge(pairs(3), lambda _: None)
    assert log.requests == Counter(Q0=1, Q1=1, Q2=1)


def test_a_disk_that_takes_nothing_ends_it(tmp_path: Path) -> None:
    """An answer that cannot be kept would be paid again: nothing more is asked."""
    log = Log()
    (tmp_path / "file").write_text("no folder")
    with serving(lambda *_: GOOD, log) as server, pytest.raises(UserError, match="cannot write"):
        judge_at(server.url, tmp_path / "file", concurrency=2).judge(pairs(20), lambda _: None)
    assert sum(log.requests.values()) <= 3


def test_text_of_every_kind_is_sent(tmp_path: Path) -> None:
    log, text = Log(), '<script>alert("é")</script> \ud83d \x00 \u2028 [[B]]'
    with serving(lambda *_: GOOD, log) as server:
        (verdict,) = ask(
            judge_at(server.url, tmp_path), [Pair("t", "summary", "id", "Q1", text, "")]
        )
    assert verdict.choice == FIRST and text in log.bodies[0]["messages"][1]["content"]


CHILD = """
import sys
from tests.evaluation.test_openai_judge import judge_at, pairs
from pathlib import Path
judge_at(sys.argv[1], Path(sys.argv[2]), concurrency=3).judge(pairs(12), lambda _: None)
"""


def test_killed_midway_nothing_is_asked_twice(tmp_path: Path) -> None:
    """SIGKILL after seven answers, the cache's last line torn by hand on top; those in flight are
    held by the server, unanswered."""
    log, release = Log(), threading.Event()

    def script(mark: str, _: int) -> Reply:
        return Reply() if len(log.requests) <= 7 or release.is_set() else Reply(delay=60)

    with serving(script, log) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path)]
        child = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            deadline = time.monotonic() + 60
            while len(log.requests) < 10 and time.monotonic() < deadline and child.poll() is None:
                time.sleep(0.02)
            assert len(log.requests) == 10, "seven answers, three in flight"
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        cache = tmp_path / CACHE
        assert len(cache.read_bytes().splitlines()) == 1 + 7
        with open(cache, "ab") as torn:
            torn.write(b'{"request": "12')
        release.set()
        verdicts = ask(judge_at(server.url, tmp_path), pairs(12))
    assert [v.choice for v in verdicts] == [FIRST] * 12 and sum(v.cached for v in verdicts) == 7
    assert log.answered == Counter({f"Q{i}": 1 for i in range(12)})


# ------------------------------------------------------------------------------ the key, the recipe


def test_the_key_is_seen_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    script = {
        "Q1": Reply(f"You sent {KEY}. [[B]]"),
        "Q2": Reply(status=500, body=f"key {KEY}".encode()),
    }
    log = Log()
    with serving(lambda mark, _: script[mark], log) as server:
        judge = judge_at(server.url, tmp_path, retries=1)
        verdicts = ask(judge, [pair(1), pair(2)])
    assert [v.choice for v in verdicts] == [SECOND, FAILED] and log.keys == {f"Bearer {KEY}"}
    assert "httpcore" in caplog.text, "the client logs what it does"
    out = capfd.readouterr()
    kept = [
        (tmp_path / CACHE).read_text(),
        json.dumps(judge.about()),
        repr(judge),
        repr(verdicts),
        caplog.text,
        out.out,
        out.err,
    ]
    assert len(kept) == 7 and not any(KEY in text for text in kept)


def test_a_missing_key_is_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log()
    with serving(lambda *_: GOOD, log) as server:
        monkeypatch.delenv("TEST_JUDGE_KEY")
        with pytest.raises(UserError, match="TEST_JUDGE_KEY is not set"):
            judge_at(server.url, tmp_path).judge(pairs(1), lambda _: None)
        monkeypatch.setenv("TEST_JUDGE_KEY", "sk\ufffd1")
        with pytest.raises(UserError, match="contains characters that no key has") as raised:
            judge_at(server.url, tmp_path).judge(pairs(1), lambda _: None)
        assert "\ufffd" not in str(raised.value) and not log.requests
        assert ask(judge_at(server.url, tmp_path, api_key_env=""), pairs(1))[0].choice == FIRST
        assert log.keys == {""}, "a server of one's own needs none"
        assert ask(judge_at(server.url, tmp_path), pairs(1))[0].cached, (
            "what is answered needs no key"
        )


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "",
        "ftp://x/v1",
        "http:///v1",
        "https://me:secret@x/v1",
        "https://x/v1?api-key=secret",
        "http://x:99999/v1",
        "http://x:port/v1",
        "http://[::1/v1",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError) as raised:
        judge_at(url, tmp_path)
    assert raised.value.where == "judge.base_url" and "secret" not in str(raised.value)


def test_nobody_listens(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD, Log()) as server:
        url = server.url
    for address in (url, url.replace("127.0.0.1", "no-such-host.invalid")):
        judge = judge_at(address, tmp_path, retries=9)
        with pytest.raises(UserError, match="3 attempts: cannot connect") as raised:
            judge.judge(pairs(3), lambda _: None)
        assert raised.value.where == f"judge.base_url {address}"
        assert judge.counts["attempts"] == 3


def test_a_server_without_tls(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD, Log()) as server:
        judge = judge_at(server.url.replace("http", "https", 1), tmp_path)
        with pytest.raises(UserError, match=r"cannot connect: .*SSL"):
            judge.judge(pairs(3), lambda _: None)


def test_a_host_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used: Invalid IDNA"):
        judge_at("http://xn--\u00e9\u2028/v1", tmp_path).judge(pairs(1), lambda _: None)


def test_a_recipe_block_builds_it(tmp_path: Path) -> None:
    block = {
        "name": "openai",
        "model": "m",
        "base_url": "http://localhost:8000/v1/",
        "concurrency": 2,
    }
    judge = registry.build("judge", block, {"directory": tmp_path})
    assert isinstance(judge, OpenAIJudge) and (
        judge.name,
        judge.concurrency,
        judge.api_key_env,
    ) == ("openai", 2, "OPENAI_API_KEY")
    assert not any(tmp_path.iterdir())
    assert TOKENS["prompt_tokens"] == 100
