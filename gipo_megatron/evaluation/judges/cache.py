"""A language model's replies on disk: no request is paid for twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation.store import Lines
from gipo_megatron.typed import Mismatch, built


@dataclass(frozen=True)
class Reply:
    """A server's reply as it came: it is read after it was stored, so no fault of the reader
    loses it.

    `body`: the chat completion, or {"refused": reason}. `changes`: of the request
    (chat_refusals.CHANGES). `max_tokens`: of the request; 0 is the server's default.
    """

    model: str
    body: dict[str, Any]
    max_tokens: int = 0
    changes: tuple[str, ...] = ()


def request_key(request: dict[str, Any]) -> str:
    """Return the sha256 of what decides an answer: model, messages, settings.

    max_tokens is left out: an answer that ended by itself does not depend on it.
    """
    decisive = {name: value for name, value in request.items() if name != "max_tokens"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Replies by request_key, the last one counts. Errors as in Lines."""

    def __init__(self, path: str | Path) -> None:
        self._lines = Lines(path, "judge replies 2")
        self._by_request: dict[str, Reply] = {}
        self.all: list[Reply] = []
        for number, row in self._lines.read():
            try:
                self._keep(row.pop("request"), built(Reply, row))
            except (KeyError, TypeError, Mismatch) as error:
                raise self._lines.broken(number, f"not a reply: {error}") from error

    def get(self, request: str) -> Reply | None:
        return self._by_request.get(request)

    def put(self, request: str, reply: Reply) -> None:
        """Return when the reply is on disk."""
        self._lines.append([{"request": request, **asdict(reply)}])
        self._keep(request, reply)

    def _keep(self, request: str, reply: Reply) -> None:
        self._by_request[request] = reply
        self.all.append(reply)
