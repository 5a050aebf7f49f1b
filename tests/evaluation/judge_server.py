"""An OpenAI-compatible HTTP server that does what a test tells it to, and counts what it is asked.
Real sockets, standard library."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/v1/chat/completions"
TOKENS = {"prompt_tokens": 100, "completion_tokens": 10}


@dataclass
class Reply:
    """What one request gets. `body` replaces the chat completion; `drop`: hang up before anything,
    or amid the body; or send too slowly."""

    said: Any = "A is shorter.\n[[A]]"  # the message's content
    finish: str | None = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0  # seconds
    drop: str = ""  # "" | before | amid | trickle
    more: dict[str, Any] = field(default_factory=dict)  # of the message

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps(
                {"error": {"message": f"scripted {self.status}", "code": "scripted"}}
            ).encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.said, **self.more},
            "finish_reason": self.finish,
        }
        return json.dumps({"choices": [choice], "usage": TOKENS}).encode()


def refusal(status: int, message: str, **more: Any) -> Reply:
    """An error in the form of the OpenAI interface."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status=status, body=json.dumps({"error": error | more}).encode())


# (the question's mark, the how many-th request for it, from 1) -> what it gets
Script = Callable[[str, int], Reply]


@dataclass
class Log:
    """What the server saw; it outlives a restart."""

    requests: Counter[str] = field(default_factory=Counter)  # by the question's mark
    answered: Counter[str] = field(default_factory=Counter)  # a whole HTTP 200 was sent
    times: dict[str, list[float]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, script: Script, log: Log, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.log, self.lock = script, log, threading.Lock()
        self.dead = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def die(self) -> None:
        """From within a request: connections that are open are no longer served, and soon nobody
        listens."""
        self.dead = True
        threading.Thread(target=self._stop_listening, daemon=True).start()

    def _stop_listening(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hung up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server, log = self.server, self.server.log
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = re.search(r"Q\d+", body["messages"][-1]["content"])
        assert self.path == PATH and found, self.path
        mark = found.group()
        with server.lock:
            log.requests[mark] += 1
            log.times.setdefault(mark, []).append(time.monotonic())
            log.keys.add(self.headers.get("Authorization", ""))
            log.bodies.append(body)
            log.in_flight += 1
            log.most_in_flight = max(log.most_in_flight, log.in_flight)
            reply = server.script(mark, log.requests[mark])
        try:
            time.sleep(reply.delay)
        finally:
            with server.lock:
                log.in_flight -= 1
        self._send(reply, mark)

    def _send(self, reply: Reply, mark: str) -> None:
        self.close_connection = bool(reply.drop) or self.server.dead
        if self.server.dead or reply.drop == "before":
            return
        content = reply.content()
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **reply.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        for i in range(len(content) if reply.drop == "trickle" else 0):
            self.wfile.write(content[i : i + 1])
            time.sleep(0.1)
        self.wfile.write(content[: len(content) // 2] if reply.drop else content)
        if not reply.drop and reply.status == 200:
            with self.server.lock:
                self.server.log.answered[mark] += 1


@contextmanager
def serving(script: Script, log: Log, port: int = 0) -> Iterator[JudgeServer]:
    server = JudgeServer(script, log, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
