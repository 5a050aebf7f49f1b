"""What servers that call themselves OpenAI-compatible send, by their documentation and their users'
reports: refusals of a setting, forms of an answer, waits. All inputs are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges import prompts
from gipo_megatron.evaluation.judges.answers import read_answer
from gipo_megatron.evaluation.types import FAILED, FIRST
from tests.evaluation.judge_server import TOKENS, Log, Reply, refusal, serving
from tests.evaluation.test_openai_judge import (  # noqa: F401  the fixture is autouse
    GOOD,
    ask,
    environment,
    judge_at,
    one,
    pair,
    pairs,
)

OBJECT = '{"explanation": "A is shorter.", "verdict": "A"}'

# ----------------------------------------------------------------------------------------- the form


def test_json_is_requested_and_read(tmp_path: Path) -> None:
    verdict, log, judge = one(lambda *_: Reply(OBJECT), tmp_path, answer="json")
    assert log.bodies == [
        {
            "model": "judge-1",
            "messages": prompts.messages(pair(1), "json"),
            "response_format": prompts.JSON,
            "temperature": 0.0,
            "max_tokens": 1024,
        }
    ]
    assert (verdict.choice, verdict.text) == (FIRST, OBJECT)
    assert judge.about()["answer"] == "json"
    assert judge.about()["prompts"] == prompts.fingerprint("json")


def test_each_form_has_its_answers_in_the_cache(tmp_path: Path) -> None:
    log = Log()
    with serving(lambda *_: GOOD, log) as server:
        for form in ("text", "json", "text", "json"):
            verdicts = ask(judge_at(server.url, tmp_path, answer=form), pairs(2))
            assert {v.choice for v in verdicts} == {FIRST}
    assert log.requests == {"Q0": 2, "Q1": 2}


REFUSALS = [
    (400, "This response_format type is unavailable now"),
    (422, "response_format: response_format.type `json_schema` is unavailable now at line 1"),
    (400, "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this"),
    (400, "'response_format.type' must be 'text'"),
    (400, "The response_format parameter is unsupported at the moment. Leave it unset."),
    (400, "JSON mode is not enabled for models/gemma-3-27b-it"),
    (400, "Grammar-based generation (json_schema, regex) is not supported here"),
    (400, "Failed to generate JSON. Please adjust your prompt."),
    (400, "This model does not support structured outputs"),
    (400, "output_config.format: Extra inputs are not permitted"),
    (400, "Unknown name 'additionalProperties' at 'generation_config.response_schema'"),
    (501, "guided decoding is not implemented for this backend"),
]


@pytest.mark.parametrize(("status", "message"), REFUSALS)
def test_a_server_without_schemas_is_asked_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    log = Log()

    def script(*_: object) -> Reply:
        with_schema = "response_format" in log.bodies[-1]
        return refusal(status, message) if with_schema else Reply(f"```json\n{OBJECT}\n```")

    with serving(script, log) as server:
        judge = judge_at(server.url, tmp_path, answer="json")
        assert {v.choice for v in ask(judge, pairs(4))} == {FIRST}
    assert sum(log.requests.values()) == 4 + 1
    assert judge.about()["changes"] == ["no response_format"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    "message",
    [
        "Invalid schema for response_format 'verdict': 'maxLength' is not permitted.",
        "output_config.format.schema: For 'string' type, property 'maxLength' is not supported",
    ],
)
def test_a_strict_server_gets_the_schema_without_a_length(tmp_path: Path, message: str) -> None:
    log = Log()

    def script(*_: object) -> Reply:
        return refusal(400, message) if "maxLength" in json.dumps(log.bodies[-1]) else Reply(OBJECT)

    with serving(script, log) as server:
        judge = judge_at(server.url, tmp_path, answer="json")
        assert {v.choice for v in ask(judge, pairs(2))} == {FIRST}
    assert sum(log.requests.values()) == 2 + 1
    assert judge.about()["changes"] == ["no maxLength in the schema"]
    sent = log.bodies[-1]["response_format"]["json_schema"]["schema"]
    assert sent["properties"] == {
        "explanation": {"type": "string"},
        "verdict": {"type": "string", "enum": ["A", "B", "C"]},
    }


def test_a_server_that_refuses_everything_in_turn(tmp_path: Path) -> None:
    """As o1-mini: no system role, no max_tokens, no temperature, no schema."""
    log = Log()

    def script(*_: object) -> Reply:
        body = log.bodies[-1]
        if body["messages"][0]["role"] == "system":
            return refusal(400, "Unsupported value: 'messages[0].role' does not support 'system'")
        for name in ("response_format", "temperature", "max_tokens"):
            if name in body:
                return refusal(400, f"Unsupported parameter: '{name}'", param=name)
        return Reply(OBJECT)

    with serving(script, log) as server:
        judge = judge_at(server.url, tmp_path, answer="json")
        assert {v.choice for v in ask(judge, pairs(2))} == {FIRST}
    assert sum(log.requests.values()) == 4 + 2 and len(judge.about()["changes"]) == 4


# -------------------------------------------------------------------------------------- the answers


def completion(message: Any, finish: str | None = "stop") -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": TOKENS}


THOUGHT = 'I owe {"explanation": "…", "verdict": "B"}; perhaps [[B]].'


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        ({"content": OBJECT, "reasoning": THOUGHT}, "stop"),
        ({"content": OBJECT, "reasoning_content": THOUGHT}, "stop"),
        ({"content": f"<think>{THOUGHT}</think>\n{OBJECT}"}, "stop"),
        ({"content": None, "reasoning": OBJECT}, "stop"),  # a parser that expects thoughts
        ({"content": OBJECT, "tool_calls": [], "function_call": None}, "stop"),
        ({"content": OBJECT}, None),
        ({"content": OBJECT}, "eos_token"),
        ({"content": OBJECT}, "END_TURN"),
        ({"content": {"type": "text", "text": OBJECT}}, "stop"),
        ({"content": ["It is ", {"text": OBJECT}, None, 7]}, "stop"),
        ({"content": [{"type": "text", "text": {"value": OBJECT}}]}, "stop"),
        ({"content": [{"type": "markdown", "text": OBJECT}, {"type": "citation"}]}, "stop"),
        (
            {
                "content": [
                    {"type": "redacted_thinking", "data": "="},
                    {"type": "reasoning_text", "text": THOUGHT},
                    {"type": "final", "text": OBJECT},
                ]
            },
            "stop",
        ),
    ],
)
def test_an_answer_with_a_verdict(message: dict[str, Any], finish: str | None) -> None:
    answer = read_answer(completion(message, finish))
    assert (answer.choice, answer.fault) == (FIRST, "")


CUT, NONE = "cut at max_tokens", "no verdict"


@pytest.mark.parametrize(
    ("message", "finish", "fault"),
    [
        ({"content": '{"explanation": "It says [[A]] and'}, "length", CUT),
        ({"content": '{"explanation": "It says [[A]] and'}, "MAX_TOKENS", CUT),
        ({"content": OBJECT}, "model_length", CUT),  # Mistral: the context is full
        ({"content": '{"explanation": "It says [[A]] and'}, "stop", NONE),
        ({"content": '{"explanation": "x", "verdict": "neither"}'}, "stop", NONE),
        ({"content": "It is [[A]], or rather"}, "repetition", NONE),  # vLLM's loop detection
        ({"content": "It is [[A]], or rather"}, "content_filter", NONE),
        ({"content": [{"type": "thinking", "text": "[[A]]"}]}, "stop", NONE),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": OBJECT}}]},
            "tool_calls",
            NONE,
        ),
    ],
)
def test_an_answer_without_a_verdict(message: dict[str, Any], finish: str, fault: str) -> None:
    answer = read_answer(completion(message, finish))
    assert answer.choice is None and answer.fault.startswith(fault)
    assert answer.cut == (fault == CUT)


@pytest.mark.parametrize("finish", ["abort", "error", "insufficient_system_resource"])
def test_an_answer_that_the_server_gave_up_is_requested_again(tmp_path: Path, finish: str) -> None:
    """vLLM while its weights change, OpenRouter, DeepSeek."""
    half = Reply("A seems [[A]], but", finish=finish)
    verdict, log, judge = one(lambda _, n: half if n < 3 else GOOD, tmp_path)
    assert verdict.choice == FIRST and log.requests["Q1"] == 3 and judge.about()["answers"] == 1


def test_an_answer_that_is_always_given_up_fails_and_is_sent_again_by_the_next_run(
    tmp_path: Path,
) -> None:
    log = Log()
    script = {"Q0": GOOD, "Q1": Reply("[[A]] and", finish="abort")}
    with serving(lambda mark, _: script[mark], log) as server:
        verdicts = ask(judge_at(server.url, tmp_path, retries=1), pairs(2))
        assert verdicts[1].choice == FAILED and "finish_reason abort" in verdicts[1].text
        script["Q1"] = GOOD
        assert ask(judge_at(server.url, tmp_path), pairs(2))[1].choice == FIRST
    assert log.requests == {"Q0": 1, "Q1": 3}


def events(*values: Any, end: str = "data: [DONE]\n\n") -> bytes:
    lines = "".join(f"data: {json.dumps(value)}\r\n\r\n" for value in values)
    return f": a comment\n\n{lines}{end}".encode()


def delta(finish: str | None = None, **parts: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}


STREAMS = {
    "text": events(
        delta(role="assistant", content=""),
        delta(content="A is shorter"),
        delta(content=".\n[[A"),
        delta("stop", content="]]"),
        {"choices": [], "usage": TOKENS},
    ),
    "thoughts": events(
        delta(reasoning_content="[[B]]"),
        delta(reasoning_content=None, content="A is shorter.\n[[A]]"),
        delta("stop"),
        {"choices": [], "usage": TOKENS},
    ),
    "parts": events(
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "[[B]]"}]}]),
        delta(content="A is shorter.\n"),
        {**delta("stop", content="[[A]]"), "usage": TOKENS},
    ),
    "whole": events(completion({"content": "A is shorter.\n[[A]]"})),
    "framed": json.dumps(completion({"content": "A is shorter.\n[[A]]"})).encode()
    + b"\n\ndata: [DONE]\n\n",
    "marked": b"\xef\xbb\xbf" + GOOD.content(),
    "late": b"\n\n\n" + GOOD.content(),  # empty lines keep the connection open
}


@pytest.mark.parametrize("form", STREAMS)
def test_a_stream_that_was_not_requested_is_an_answer(tmp_path: Path, form: str) -> None:
    stream = Reply(body=STREAMS[form], headers={"Content-Type": "text/event-stream"})
    verdict, log, judge = one(lambda *_: stream, tmp_path)
    assert (verdict.choice, verdict.text) == (FIRST, "A is shorter.\n[[A]]")
    assert verdict.completion_tokens == TOKENS["completion_tokens"]
    assert log.requests["Q1"] == judge.about()["answers"] == 1


@pytest.mark.parametrize("code", [502, "502"])
def test_an_error_in_a_stream_is_an_error(tmp_path: Path, code: int | str) -> None:
    error = {"error": {"message": "Provider returned error", "code": code}}
    broken = Reply(body=events(delta(content="A is [[A]]"), error))
    verdict, log, _ = one(lambda _, n: broken if n == 1 else GOOD, tmp_path)
    assert verdict.choice == FIRST and log.requests["Q1"] == 2


def test_a_stream_that_breaks_off_is_requested_again(tmp_path: Path) -> None:
    broken = Reply(body=events(delta(content="[[A]] seems"), end=""))
    script = {"Q0": GOOD, "Q1": broken}
    log = Log()
    with serving(lambda m, n: script[m] if n == 1 else Reply("[[A]]"), log) as server:
        verdicts = ask(judge_at(server.url, tmp_path, concurrency=1), pairs(2))
    assert verdicts[1].text == "[[A]]" and log.requests == {"Q0": 1, "Q1": 2}


# ------------------------------------------------------------------------------- waits, addresses


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after-ms": "500", "Retry-After": "60"},
        {"x-ms-retry-after-ms": "500"},
        {"retry-after-ms": "soon", "Retry-After": "0.5"},
        {"retry-after-ms": "-1", "Retry-After": "0.5"},
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_in_milliseconds(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    busy = Reply(status=status, headers=headers)
    _, log, _ = one(lambda _, n: busy if n == 1 else GOOD, tmp_path)
    first, second = log.times["Q1"]
    assert 0.5 <= second - first < 30


def test_a_wait_of_many_milliseconds_ends_it(tmp_path: Path) -> None:
    busy = Reply(status=429, headers={"retry-after-ms": "86400000"})
    with pytest.raises(UserError, match="requests a wait of 86400 s"):
        one(lambda *_: busy, tmp_path)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("http://x:8000/v1/chat/completions", "use http://x:8000/v1"),
        ("https://x/v1/chat/completions/", "use https://x/v1"),
    ],
)
def test_the_address_of_a_route(tmp_path: Path, url: str, fix: str) -> None:
    with pytest.raises(UserError, match="is the address of one route") as raised:
        judge_at(url, tmp_path)
    assert raised.value.fix == fix


@pytest.mark.parametrize(
    ("reply", "words", "fix"),
    [
        (  # vLLM, in these words
            refusal(
                400,
                "As of transformers v4.44, default chat template is no longer allowed, so you must"
                " provide a chat template if the tokenizer does not define one.",
            ),
            "default chat template is no longer allowed",
            "--chat-template",
        ),
        (
            refusal(400, "max_tokens=1024 cannot be greater than max_model_len=512."),
            "cannot be greater than max_model_len",
            "setting that it names",
        ),
        (
            refusal(404, "The model `judge-1` does not exist.", type="NotFoundError", code=404),
            "does not exist",
            "judge.model",
        ),
        (Reply(status=404, body=b'{"detail": "Not Found"}'), "Not Found", "most end in /v1"),
        (Reply(status=403, body=b"<html>Blocked</html>"), "Blocked", "check the key"),
    ],
)
def test_what_a_server_refuses_for_good(tmp_path: Path, reply: Reply, words: str, fix: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        one(lambda *_: reply, tmp_path)
    assert fix in raised.value.fix


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (  # vLLM
            400,
            "This model's maximum context length is 512 tokens. However, your prompt contains 600"
            " input tokens, which exceeds this limit even without any output tokens.",
        ),
        (400, "This model's maximum prompt length is 512 but the request contains 600 tokens."),
        (413, "Request too large for this model: limit 512, please reduce your message size"),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 600"),
        (400, "too many tokens: the prompt has 600, the limit is 512"),
        (400, "The input token count (600) exceeds the maximum number of tokens allowed (512)."),
    ],
)
def test_a_prompt_that_is_too_long_fails_alone(tmp_path: Path, status: int, message: str) -> None:
    log = Log()
    long = refusal(status, message)
    with serving(lambda mark, _: long if mark == "Q0" else GOOD, log) as server:
        verdicts = ask(judge_at(server.url, tmp_path), pairs(2))
    assert [v.choice for v in verdicts] == [FAILED, FIRST]
    assert message[:50] in verdicts[0].text and sum(log.requests.values()) == 2
