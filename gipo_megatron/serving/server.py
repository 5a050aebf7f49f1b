"""Rank 0's end of a server: its process or its URL, the weights in it, and what happens when it is
lost."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gipo_megatron.errors import UserError
from gipo_megatron.serving.client import Answer, Client, Needed, Request, ServerLost
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.serving.transfer import Transfer
from gipo_megatron.tensors import Tensor


@dataclass
class Server:
    """A server that has the properties `needed`: `process`, or without one a server at `url`.

    restarts: how often a lost server is replaced, in the whole run. timeout: of `Client`. report:
    gets a line about each restart.
    """

    needed: Needed
    transfer: Transfer
    process: ServerProcess | None
    url: str
    timeout: float
    restarts: int
    report: Callable[[str], None]
    version: str = field(default="", init=False)  # of the weights in it
    _client: Client | None = field(default=None, init=False)
    _lost: int = field(default=0, init=False)
    _pushes: int = field(default=0, init=False)
    _run: str = field(default_factory=lambda: secrets.token_hex(4), init=False)

    def start(self) -> None:
        """Start the server where it is not running, and check it. Raises UserError."""
        url = self.process.start() if self.process is not None else self.url
        self._client = Client(url, self.timeout)
        try:
            self._client.check(self.needed)
        except ServerLost as error:
            raise self._error(f"no server that can be used: {error}") from error

    def close(self) -> None:
        """End the server where this run started it."""
        self.transfer.close()
        self._client = None
        if self.process is not None:
            self.process.stop()

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load `weights`, iterated to the end, under a new version. Raises ServerLost and
        UserError."""
        assert self._client is not None
        self._pushes += 1
        # of this process alone: the weights of an earlier run are never taken for these
        self.version = f"{self._run}-{self._pushes}"
        self.transfer.push(self._client, weights, self.version)

    def draw(self, requests: Sequence[Request], answers: dict[int, Answer]) -> None:
        """Put the answers that are missing into `answers`, by index, all of the pushed weights.

        Raises ServerLost and UserError; the answers that came before stay in `answers`.
        """
        assert self._client is not None
        kept = {*answers}
        try:
            self._client.generate(requests, answers)
        finally:
            new = {index: answers[index].version for index in answers if index not in kept}
            others = {index: version for index, version in new.items() if version != self.version}
            for index in others:
                del answers[index]
        if others:
            found = ", ".join(sorted({*others.values()}))
            raise ServerLost(
                f"{len(others)} responses are of weights {found}, not {self.version}: another"
                " program gave the server weights, or started it again"
            )

    def replace(self, reason: ServerLost) -> None:
        """Make a server ready in place of the lost one; it has no weights. Raises UserError when
        that happened too often."""
        self._lost += 1
        if self._lost > self.restarts:
            spent = f"its restarts ({self.restarts}) are used up"
            raise self._error(f"the rollout server was lost, and {spent}: {reason}")
        count = f"restart {self._lost} of {self.restarts}"
        self.report(f"{count}: the rollout server was lost: {reason}")
        self.close()
        self.start()

    def _error(self, what: str) -> UserError:
        if self.process is not None:
            return self.process.failure(what)
        return UserError(what, where=self.url, fix="start the server again")
