from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gipo_megatron.data.hub import PATIENCE, is_hub_name, reach_hub
from gipo_megatron.errors import UserError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def silent() -> Iterator[int]:
    """A server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Refuse(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_names() -> None:
    assert all(is_hub_name(name) for name in ("gpt2", "meta-llama/Llama-2-7b-hf", "a.b/c_d"))
    assert not any(
        is_hub_name(name) for name in ("", "../x", "/abs/path", "./x", "a/b/c", "~/x", "a b")
    )


def test_silence_ends_within_the_patience(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent}")
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as raised:
        reach_hub("a/b", "data.path", "give a folder", patience=0.3)
    assert time.monotonic() - start < PATIENCE  # not the default
    assert (raised.value.where, raised.value.fix) == ("data.path", "give a folder")


def test_any_answer_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        reach_hub("a/b", "data.path", "give a folder")
        thread.join()


def test_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        reach_hub("a/b", "data.path", "give a folder")
