"""Servers that misbehave, against the judge and the client of a rollout server: bounded in time and
memory, an error that names the server, no request to any other host."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from gipo_megatron import http_client
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges.openai import CACHE, OpenAIJudge
from gipo_megatron.evaluation.types import FIRST, Pair
from gipo_megatron.serving.client import Answer, Client, Request, ServerLost
from tools.faults.servers import FAULTS, bomb, judge, serving

KEY = "sk-never/shown+0123456789"
# faults that end the evaluation: no retry helps
REFUSED = ("dies", "redirects to another host")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "LONGEST", 4 * 2**20)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TEST_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, KEY)


def ask(
    url: str, folder: Path, count: int = 1, *, timeout: float = 30, retries: int = 0
) -> list[str]:
    judge = OpenAIJudge(
        "m", url + "/v1", "TEST_KEY", directory=folder, concurrency=1, timeout=timeout,
        retries=retries, backoff=0.01,
    )  # fmt: skip
    pairs = [Pair("t", "helpful", f"i{i}", f"q{i}", "one", "two") for i in range(count)]
    return [v.choice for v in judge.judge(pairs, lambda _: None) if v is not None]


@pytest.mark.parametrize("name", FAULTS)
def test_a_judge_with_a_fault(name: str, tmp_path: Path) -> None:
    """Of four answers the second has a fault, once: all verdicts, one request more. From the first
    answer on: four failed verdicts, or an error of the user before that."""
    bomb()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(judge) as other:
        once = {"fault": FAULTS[name], "after": 1, "times": 1, "other": other.url}
        with serving(judge, **once) as server, suppress(UserError):
            assert ask(server.url, tmp_path / "once", 4, timeout=3, retries=2) == [FIRST] * 4
            assert len(server.requests) >= 5
        kept = (tmp_path / "once" / CACHE).read_text()
        assert kept.count("verdict") == (1 if name in REFUSED else 4) and KEY not in kept
        always = serving(judge, fault=FAULTS[name], other=other.url)
        with always as server, pytest.raises(UserError) as raised:
            ask(server.url, tmp_path / "always", 4, timeout=0.3)
        assert raised.value.where.startswith(f"judge.base_url {server.url}")
        assert len(str(raised.value)) < 1000 and len(str(raised.value).splitlines()) == 3
        assert KEY not in str(raised.value) and not other.requests
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 110_000
    )  # KiB; the bomb has 128 MiB


def vllm(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    if route == "/health":
        return 200, b""
    if route == "/echo":
        return 403, json.dumps({"error": {"message": f"bad {headers['authorization']}"}}).encode()
    entry = {"token_id": 5, "logprob": -0.5}
    choice = {
        "token_ids": [5],
        "finish_reason": "stop",
        "logprobs": {"content": [entry]},
        "weight_versions": [{"version": "v"}],
    }
    return 200, json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize("name", FAULTS)
def test_a_rollout_server_with_a_fault(name: str) -> None:
    """A response, a control request and a look at its health: within the limits, an error."""
    request, found = Request([1], {"max_tokens": 1}), dict[int, Answer]()
    with serving(vllm) as other, serving(vllm) as server:
        server.other = other.url
        Client(server.url, 30).generate([request], found)
        assert found[0].token_ids == (5,)
        server.fault, client = FAULTS[name], Client(server.url, 0.5)
        with pytest.raises((ServerLost, UserError)) as raised:
            client.generate([request, request], found)
        assert server.url in str(raised.value) and len(str(raised.value)) < 1000
        for send in (lambda: client.get("/v1/models"), lambda: client.post("/pause")):
            if name != "an empty answer":
                with pytest.raises((ServerLost, UserError)):
                    send()
        assert not other.requests and KEY not in str(raised.value)


def test_the_health_of_a_server_that_trickles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gipo_megatron.serving.client.CONNECT", 0.3)
    with serving(vllm, fault=FAULTS["trickles"]) as server:
        assert not Client(server.url, 60).healthy()


def test_a_rollout_servers_words_show_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(vllm) as server:
        with pytest.raises(UserError, match="HTTP 403: bad Bearer …") as raised:
            Client(server.url, 30).get("/echo")
        assert KEY not in str(raised.value)
        monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\N{BULLET}")
        with pytest.raises(UserError, match="characters that no key has") as raised:
            Client(server.url, 30)
        assert KEY not in str(raised.value)


def test_a_judge_that_writes_the_key_in_escapes(tmp_path: Path) -> None:
    r"""json_encode of PHP writes \/ for /, and a proxy may write \u002b for +."""
    escaped = KEY.replace("/", r"\/").replace("+", r"\u002b")
    said = f'{{"choices": [{{"message": {{"content": "{escaped} [[A]]"}}}}]}}'
    with serving(lambda *_: (200, said.encode())) as server:
        assert ask(server.url, tmp_path) == [FIRST]
    assert json.loads((tmp_path / CACHE).read_text().splitlines()[1])["body"]["choices"][0] == {
        "message": {"content": "… [[A]]"}
    }


def test_a_short_key_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without keys gets any word; it stands in every answer."""
    for key in ("1", "A", "EMPTY"):
        monkeypatch.setenv("TEST_KEY", key)
        with serving(judge) as server:
            assert ask(server.url, tmp_path / key) == [FIRST]


def test_a_long_message_of_a_server_is_searched_in_part(tmp_path: Path) -> None:
    """Its words decide about the next request; a search of all of them could take hours."""
    words = json.dumps({"error": {"message": "generat" * 100_000}}).encode()
    with serving(lambda *_: (422, words)) as server, pytest.raises(UserError):
        ask(server.url, tmp_path)
