"""An HTTP server that answers well, and from some request on with a fault: for the clients of
judges and of rollout servers. Real sockets, standard library."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

# status and body of a good answer to (method, route, body, headers)
Answer = Callable[[str, str, bytes, Mapping[str, str]], tuple[int, bytes]]
Fault = Callable[[socket.socket, bytes, "Server"], None]
PATIENCE = 60.0  # seconds that a fault lasts at most
BLOCK = b" " * 65536
BOMB = 2**27  # bytes that a small answer unpacks to


def head(*lines: str, status: str = "200 OK") -> bytes:
    fields = ["Content-Type: application/json", *lines]
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()


def whole(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def dies(client: socket.socket, body: bytes, server: Server) -> None:
    server.stop()


def breaks_off(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(body)[: -len(body) // 2])


def stalls(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(body)[: -len(body) // 2])
    server.stopped.wait(PATIENCE)


def trickles(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(head("Content-Length: 1000000"))
    while not server.stopped.wait(0.05):
        client.sendall(b" ")


def floods(client: socket.socket, body: bytes, server: Server) -> None:
    """A body without an end."""
    client.sendall(head("Transfer-Encoding: chunked"))
    while not server.stopped.is_set():
        client.sendall(b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK))


def floods_headers(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in itertools.count():
        client.sendall(f"X-{number}: {'a' * 4000}\r\n".encode())


def declares_more(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(head(f"Content-Length: {len(body) + 1000}") + body)


def declares_less(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(head(f"Content-Length: {len(body) // 2}") + body)


def declares_nonsense(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(head("Content-Length: many") + body)


def declares_two(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(head("Content-Length: 5", f"Content-Length: {len(body)}") + body)


def is_html(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(b"<!doctype html><title>Sign in</title><p>\x1b[2JSign in"))


def redirects(client: socket.socket, body: bytes, server: Server) -> None:
    place = f"Location: {server.other}/stolen?key=1"
    client.sendall(whole(b"", place, status="307 Temporary Redirect"))


def bombs(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(bomb(), "Content-Encoding: gzip, gzip"))


@functools.cache
def bomb() -> bytes:
    packer = zlib.compressobj(wbits=31)
    blocks = [packer.compress(BLOCK) for _ in range(BOMB // len(BLOCK))]
    return gzip.compress(b"".join([*blocks, packer.flush()]))


def nests(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(b'{"choices": ' + b"[" * 100_000))


def nests_well(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(b'{"choices": [{"a": ' + b"[" * 500 + b"]" * 500 + b"}]}"))


def is_empty(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(whole(b""))


def is_no_http(client: socket.socket, body: bytes, server: Server) -> None:
    client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\x1b[2J\x00\xff")


FAULTS: dict[str, Fault] = {
    "dies": dies,
    "breaks off": breaks_off,
    "stalls": stalls,
    "trickles": trickles,
    "floods": floods,
    "floods with headers": floods_headers,
    "declares a longer body": declares_more,
    "declares a shorter body": declares_less,
    "declares no number": declares_nonsense,
    "declares two lengths": declares_two,
    "answers HTML": is_html,
    "redirects to another host": redirects,
    "gzip bomb": bombs,
    "JSON of 100,000 lists": nests,
    "JSON of 500 lists": nests_well,
    "an empty answer": is_empty,
    "another protocol": is_no_http,
}


@dataclass
class Server:
    """Answers as `answer` does; requests to `route` number `after` and later, at most `times` of
    them, get the `fault`. `other`: where it redirects to."""

    answer: Answer
    fault: Fault | None = None
    route: str = ""
    after: int = 0
    times: float = float("inf")
    other: str = ""
    requests: list[str] = field(default_factory=list)  # routes
    stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._socket.close()

    def _listen(self) -> None:
        with suppress(OSError):  # stopped
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Answer one request, and close the connection."""
        with client, suppress(OSError), client.makefile("rb") as lines:
            method, route, *_ = lines.readline().decode().split()
            pairs = iter(lambda: lines.readline().decode().strip(), "")
            headers = {k.lower(): v.strip() for k, _, v in (p.partition(":") for p in pairs)}
            body = lines.read(int(headers.get("content-length", 0)))
            with self._lock:
                self.requests.append(route)
                number = sum(r.startswith(self.route) for r in self.requests) - 1
            hit = route.startswith(self.route) and self.after <= number < self.after + self.times
            status, answer = self.answer(method, route, body, headers)
            if self.fault is not None and hit:
                self.fault(client, answer, self)
            elif not self.stopped.is_set():
                client.sendall(whole(answer, "Connection: close", status=f"{status} x"))


@contextmanager
def serving(answer: Answer, **settings: Any) -> Iterator[Server]:
    server = Server(answer, **settings)
    try:
        yield server
    finally:
        server.stop()


def judge(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Prefer answer A, as an OpenAI-compatible server; the key it got is in its answer."""
    said = {"explanation": f"Your key is {headers.get('authorization')}.", "verdict": "A"}
    message = {"role": "assistant", "content": json.dumps(said)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, json.dumps({"choices": [choice], "usage": {}}).encode()


def wandb(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Answer as a W&B server, so far that a run begins, logs and ends."""
    if route != "/graphql":
        return 200, b"{}"
    packed = headers.get("content-encoding") == "gzip"
    asked = json.loads(gzip.decompress(body) if packed else body)
    project = {"id": "p", "name": "gipo", "entity": {"id": "e", "name": "me"}}
    bucket = {"id": "b", "name": "run", "config": "{}", "historyLineCount": 0, "project": project}
    files = [
        {"name": name, "uploadUrl": f"http://{headers['host']}/{name}"}
        for name in asked.get("variables", {}).get("files", [])
    ]
    data = {
        "upsertBucket": {"bucket": bucket, "inserted": True},
        "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files},
        "entity": None,
    }
    return 200, json.dumps({"data": data}).encode()
