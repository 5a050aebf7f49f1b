"""The client against the fake server: what is checked, what is kept, which error is which."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.serving import client as client_module
from gipo_megatron.serving.client import Answer, Client, Needed, Request, ServerLost, read_answer
from gipo_megatron.serving.process import free_port
from tests.serving.exchanges import PROMPT, RECORDED, sampling
from tests.serving.fake import ROUTES, Options, Refused, Server, serving

TEXT, IDS = "a b", [1, 2]
NEEDED = Needed(
    tokens=64, vocab_size=40, hidden_size=16, num_layers=2, text=TEXT, token_ids=tuple(IDS)
)
REQUESTS = [Request(PROMPT, sampling(seed=seed)) for seed in range(6)]


@pytest.fixture
def options(folder: Path) -> Options:
    return Options(folder, max_model_len=64, tokens={TEXT: IDS})


def connect(server: Server, timeout: float = 30) -> Client:
    return Client(server.url, timeout)


# ------------------------------------------------------------------------------------------ check


def test_the_right_server_passes(options: Options) -> None:
    with serving(options) as server:
        client = connect(server)
        client.check(NEEDED)
        assert client.healthy()
        assert client.get("/weight_info") == {"weight_version": "default"}
        client.post("/pause", mode="wait")
        assert client.get("/is_paused") == {"is_paused": True}


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"routes": False}, "was started without --enable-scale-out", "VLLM_SERVER_DEV_MODE=1"),
        ({"max_model_len": 63}, "takes 63 tokens", "--max-model-len 64"),
        ({"vocab_size": 48}, "another model: vocab_size 48, not 40", "the actor's model"),
        ({"plugin": 0}, "without version 1 of this project's plugin", "gipo_vllm_worker"),
        ({"logprobs_mode": "raw_logprobs"}, "log-probs are raw_logprobs", "processed_logprobs"),
        ({"tokens": {TEXT: [2, 1]}}, "another tokenizer", "--tokenizer"),
    ],
)
def test_another_server_is_refused(
    options: Options, change: dict[str, Any], what: str, fix: str
) -> None:
    with serving(replace(options, **change)) as server:
        with pytest.raises(UserError) as error:
            connect(server).check(NEEDED)
        assert what in str(error.value) and fix in error.value.fix
        assert error.value.where == server.url


def test_a_server_without_the_plugin_is_refused(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM answers HTTP 500 for a method that its workers lack; its engine still runs."""
    with serving(options) as server:
        monkeypatch.setattr(
            server.engine,
            "call",
            lambda _: server.engine.__class__.call(server.engine, "gipo_nothing"),
        )
        with pytest.raises(UserError, match="project's plugin"):
            connect(server).check(NEEDED)


def test_an_absent_server_is_lost_and_no_address_is_a_users_error() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}", 5)
    with pytest.raises(ServerLost, match="ConnectError"):
        client.check(NEEDED)
    with pytest.raises(ServerLost, match="ConnectError"):
        client.generate(REQUESTS, {})
    assert not client.healthy()
    client = Client("nothing://here", 5)
    with pytest.raises(UserError, match="no URL of a server"):
        client.check(NEEDED)


def test_another_program_is_no_vllm_server(options: Options) -> None:
    with serving(options) as server:
        client = connect(server)
        with pytest.raises(UserError, match="HTTP 404: Not Found"):
            client.get("/v1/nothing")
        server.engine.options.max_model_len = None  # type: ignore[assignment]
        with pytest.raises(UserError, match="no vLLM server"):
            client.check(NEEDED)


def test_the_key_is_sent_and_no_proxy_is_used(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serving(options) as server:
        client = connect(server)
        answers: dict[int, Answer] = {}
        client.generate(REQUESTS[:1], answers)
        client.check(NEEDED)
        assert server.keys == {"Bearer secret"}
    assert len(answers) == 1


# --------------------------------------------------------------------------------------- generate


def test_each_request_gets_its_own_answer(options: Options) -> None:
    """Sent together or one by one, with some answers there already."""
    with serving(options) as server:
        client = connect(server)
        together: dict[int, Answer] = {}
        client.generate(REQUESTS, together)
        alone: dict[int, Answer] = {1: together[1], 4: together[4]}
        for i in range(len(REQUESTS)):
            client.generate(REQUESTS[: i + 1], alone)
        assert len(server.requests) == 6 + 4
    assert together == alone and len(set(together.values())) == 6
    assert all(answer.version == "default" for answer in together.values())


@pytest.mark.parametrize("fault", ["die:3", "memory:3"])
def test_answers_before_a_loss_are_kept(
    options: Options, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(client_module, "CONNECTIONS", 1)  # one after the other
    answers: dict[int, Answer] = {}
    with serving(replace(options, fault=fault)) as server:
        with pytest.raises(ServerLost) as error:
            connect(server).generate(REQUESTS, answers)
        assert sorted(answers) == [0, 1, 2]
        words = "HTTP 500: CUDA out of memory" if "memory" in fault else "RemoteProtocolError"
        assert words in str(error.value)
    first = dict(answers)
    with serving(options) as server:
        connect(server).generate(REQUESTS, answers)
        assert len(server.requests) == 3
    assert sorted(answers) == list(range(6)) and first.items() < answers.items()


def test_a_server_that_finishes_nothing_is_lost(options: Options) -> None:
    answers: dict[int, Answer] = {}
    words = r"none of 6 responses was finished in 0\.2 s"
    hangs = replace(options, fault="hang:0")
    with serving(hangs) as server, pytest.raises(ServerLost, match=words):
        connect(server, timeout=0.2).generate(REQUESTS, answers)
    assert not answers


def test_a_control_request_has_a_limit(options: Options) -> None:
    body = {"token_ids": PROMPT, "sampling_params": sampling()}
    hangs, words = replace(options, fault="hang:0"), "does not answer: TimeoutError"
    with serving(hangs) as server, pytest.raises(ServerLost, match=words):
        connect(server, timeout=0.2).post("/inference/v1/generate", body)


def test_open_requests_of_a_server_whose_engine_died_are_given_up(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's server waits for its open requests then; without a look at its health, so would we."""

    def unhealthy(handler: Any, body: Any, query: Any) -> Any:
        raise Refused(503, "engine dead")

    monkeypatch.setattr(client_module, "HEALTH", 0.05)
    body = {"token_ids": PROMPT, "sampling_params": sampling()}
    with serving(replace(options, fault="hang:0")) as server:
        client = connect(server, timeout=60)
        works = client._while_healthy(asyncio.sleep(0.3, "done"))
        assert asyncio.run(works) == "done"  # healthy all the time
        monkeypatch.setitem(ROUTES, "/health", ("GET", unhealthy))
        with pytest.raises(ServerLost, match="its engine has died"):
            client.generate(REQUESTS, {})
        with pytest.raises(ServerLost, match="its engine has died"):
            client.post("/inference/v1/generate", body)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("malformed:0", "3 log-probs of 4 tokens"),
        ("nan:0", "a log-prob is -9999.0, not finite"),
        ("text:0", "the server's answer is no JSON: '<html>'"),
        ("abort:0", "finish_reason 'abort'"),
    ],
)
def test_a_malformed_answer_is_an_error(options: Options, fault: str, what: str) -> None:
    with serving(replace(options, fault=fault)) as server, pytest.raises(UserError) as error:
        connect(server).generate(REQUESTS, {})
    assert what in str(error.value) and error.value.fix


def test_older_weights_are_seen(options: Options) -> None:
    """The version is the answer's, not the server's last one."""
    with serving(replace(options, fault="stale:0")) as server:
        server.engine.versions += ["v1", "v2"]
        answers: dict[int, Answer] = {}
        connect(server).generate(REQUESTS[:1], answers)
    assert answers[0].version == "v1"


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (Request([5] * 64, sampling()), "longer than"),
        (Request([40], sampling()), "out of vocabulary"),
        (Request(PROMPT, sampling(max_tokens=100)), "cut a response after 60 tokens, where 100"),
    ],
)
def test_a_request_that_can_never_succeed_is_a_users_error(
    options: Options, request_: Request, what: str
) -> None:
    with serving(options) as server, pytest.raises(UserError) as error:
        connect(server).generate([request_], {})
    assert what in str(error.value) and error.value.fix


# ---------------------------------------------------------------------------- a recorded answer


@pytest.fixture
def body() -> dict[str, Any]:
    recorded = json.loads((RECORDED / "vllm.json").read_text(encoding="utf-8"))
    return copy.deepcopy(recorded["generate"]["body"])


def test_weights_that_changed_amid_a_response_have_a_version_of_no_weights(body: Any) -> None:
    body["choices"][0]["weight_versions"] = [
        {"version": "a1", "start": 0, "end": 2},
        {"version": "a2", "start": 2, "end": 4},
    ]
    assert read_answer(body, "http://recorded").version == "a1+a2"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("choices",), []),
        (("choices", 0, "token_ids"), None),
        (("choices", 0, "token_ids"), []),
        (("choices", 0, "token_ids", 0), 1.5),
        (("choices", 0, "token_ids", 0), 1),
        (("choices", 0, "logprobs"), None),
        (("choices", 0, "logprobs", "content", 0, "logprob"), math.nan),
        (("choices", 0, "logprobs", "content", 0, "logprob"), None),
        (("choices", 0, "weight_versions"), None),
        (("choices", 0, "weight_versions"), []),
        (("choices", 0, "weight_versions", 0, "version"), None),
        (("choices", 0, "finish_reason"), None),
    ],
)
def test_each_part_of_an_answer_is_checked(body: Any, path: tuple[Any, ...], value: Any) -> None:
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(UserError) as error:
        read_answer(body, "http://recorded")
    assert error.value.where == "http://recorded" and error.value.fix
