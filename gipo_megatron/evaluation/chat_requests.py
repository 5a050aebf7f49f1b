"""Send chat requests through the `openai` client, several at a time, each with retries.

The client's own retries are off: ours stop as soon as the server is found dead, limit the time of
a whole attempt, print each wait, and keep to what the server refused before. Faults that pass are
retried: a lost connection, a time-out, HTTP 408, 409, 425, 429, 5xx. All others end the evaluation
at once; its replies are kept.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import openai

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.chat_bodies import GIVEN_UP, body_of
from gipo_megatron.evaluation.chat_refusals import (
    CHANGES,
    QUOTA,
    TEXT,
    change_for,
    changed,
    error_object,
    seconds_to_wait,
)
from gipo_megatron.evaluation.judges.cache import Reply
from gipo_megatron.http_client import HttpClient
from gipo_megatron.screen import hide, shown
from gipo_megatron.web import at

if TYPE_CHECKING:
    from gipo_megatron.evaluation.judges.openai import OpenAIJudge

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 120.0  # seconds of a Retry-After; the client of openai has the same limit
CONNECT = 10.0  # seconds to connect within
# attempts to connect before the first reply: the address may be wrong
FIRST_ATTEMPTS = 3
RETRIED = (408, 409, 425, 429)  # besides 5xx
HINTS = {
    401: "check the key in {key}",
    402: "add credit to the account, then repeat the same command",
    403: "check the key in {key} and its rights",
    404: "check judge.base_url (most end in /v1) and judge.model",
    429: "raise the account's quota, then repeat the same command",
}
NO_TEMPLATE = "serve a model with a chat template, or start vLLM with --chat-template FILE"
SHOWN = 300  # characters of a server's message
READ = 10_000  # characters of it that are searched
QUIET = 10.0  # seconds between two lines about waits
# The server is considered dead after this many failed requests in a row (or `concurrency` many).
DEAD_AFTER = 4


class Unanswered(Exception):
    """A failed attempt; the message is the reason.

    `wait`: seconds until the next attempt that the server requested. `connected`: false if no
    connection to the server was made, or it was lost. `change`: of the next attempt.
    """

    def __init__(
        self, reason: str, wait: float = 0.0, connected: bool = True, change: str = ""
    ) -> None:
        super().__init__(reason)
        self.wait, self.connected, self.change = wait, connected, change


class Requests:
    """`judge.concurrency` workers send `missing` {key: request} and put each reply in the cache.

    `answered(key)` is called after each request, also after a failed one. When a worker finds the
    server dead, no further request is sent; requests in flight are completed and kept.
    """

    def __init__(
        self,
        judge: OpenAIJudge,
        secret: str,
        missing: Mapping[str, dict[str, Any]],
        answered: Callable[[str], None],
    ) -> None:
        self._judge, self._secret, self._answered = judge, secret, answered
        self._left = iter(missing.items())
        self._workers = min(judge.concurrency, len(missing))
        self._failed: dict[str, str] = {}
        self._failed_in_a_row = 0
        self._problem: UserError | None = None
        self._stop = asyncio.Event()
        self._noise = random.Random()  # of the jitter
        self._next_line = 0.0

    async def send_all(self) -> dict[str, str]:
        """Return {key: reason} of the requests that failed after all retries.

        Raises UserError if the server is dead or refuses the settings (key, model, address).
        """
        timeout = self._judge.timeout
        try:
            limits = openai.Timeout(timeout, connect=min(CONNECT, timeout))
            client = openai.AsyncOpenAI(
                api_key=self._secret or "none",
                base_url=self._judge.base_url,
                timeout=limits,
                max_retries=0,
                http_client=HttpClient(timeout=limits),
            )
        except Exception as error:  # of the HTTP library: the address, or a proxy's
            raise self._permanent(f"cannot be used: {error}", "check it, and HTTP_PROXY") from error
        async with client:
            # the first one alone: it finds out what the server refuses
            await self._work(client, 0 if self._judge.counts["completions"] else 1)
            await asyncio.gather(*(self._work(client) for _ in range(self._workers)))
        if self._problem is not None:
            raise self._problem
        return self._failed

    async def _work(self, client: openai.AsyncOpenAI, most: int | None = None) -> None:
        judge = self._judge
        for key, request in islice(self._left, most):
            if self._stop.is_set():
                return
            try:
                judge.cache.put(key, await self._send(client, request))
            except Unanswered as failure:
                self._failed[key] = str(failure)
                self._failed_in_a_row += 1
                self._answered(key)
                limit = max(DEAD_AFTER, judge.concurrency)
                if not failure.connected or self._failed_in_a_row >= limit:
                    fix = "start the server or check the address, then repeat the same command"
                    self._end(self._permanent(f"does not answer: {failure}", fix))
            except UserError as problem:
                self._end(problem)
            else:
                self._failed_in_a_row = 0
                judge.counts["answered"] += 1
                self._answered(key)

    def _permanent(self, what: str, fix: str) -> UserError:
        kept = len(self._judge.cache.all)
        return UserError(
            f"the judge's server {what}",
            where=f"judge.base_url {self._judge.base_url}",
            fix=f"{fix}; {kept} answers are kept and not requested again",
        )

    def _end(self, problem: UserError) -> None:
        """Stop all workers. The first problem is reported: later ones may follow from it."""
        self._problem = self._problem or problem
        self._stop.set()

    # ------------------------------------------------------------------------------- one request

    async def _send(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Reply:
        """Raise Unanswered after all retries, UserError if a retry cannot help."""
        attempt = 0
        while True:
            changes = tuple(name for name in CHANGES if name in self._judge.changes)
            sent = changed(request, changes)
            try:
                body = await self._attempt(client, sent)
            except Unanswered as failure:
                if failure.change:
                    self._change(failure)
                    continue
                attempt += 1
                attempts = self._judge.retries + 1
                if not (failure.connected or self._judge.counts["completions"]):
                    attempts = min(attempts, FIRST_ATTEMPTS)
                if attempt >= attempts or await self._stopped_after(attempt, failure):
                    reason = f"no answer after {attempt} attempts: {failure}"
                    raise Unanswered(reason, connected=failure.connected) from failure
            else:
                return Reply(self._judge.model, body, self._judge.max_tokens, changes)

    def _change(self, refusal: Unanswered) -> None:
        if refusal.change not in self._judge.changes:
            self._judge.changes.append(refusal.change)
            self._print(f"requests from now on have {refusal.change}: {refusal}")

    async def _stopped_after(self, attempt: int, failure: Unanswered) -> bool:
        """Wait: exponentially with jitter, at least as long as the server requested."""
        backoff = min(LONGEST_BACKOFF, self._judge.backoff * 2 ** (attempt - 1))
        jitter = self._noise.random() / 2
        pause = failure.wait + backoff * jitter if failure.wait else backoff * (1 - jitter)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + QUIET
            self._print(f"{failure}; attempt {attempt + 1} in {pause:.3g} s")
        try:
            await asyncio.wait_for(self._stop.wait(), pause)
        except TimeoutError:
            return False
        return True

    def _print(self, line: str) -> None:
        print(shown(f"{self._judge.name}: {line}"), flush=True)

    async def _attempt(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
        """Return the server's chat completion. Raises Unanswered or UserError."""
        self._judge.counts["attempts"] += 1
        # ASCII: the client's own encoding fails for half of a surrogate pair
        content = json.dumps(request).encode()
        headers: dict[str, str | openai.Omit] = {"Content-Type": "application/json"}
        if not self._secret:
            headers["Authorization"] = openai.Omit()
        try:
            # the client's time-outs are per read: a server that sends slowly would never time out
            async with asyncio.timeout(self._judge.timeout):
                text = await client.post(
                    "/chat/completions", cast_to=str, content=content, options={"headers": headers}
                )
        except openai.APIStatusError as error:
            wait = seconds_to_wait(error.response.headers)
            body = error.body or error.response.text
            return self._refusal(error.status_code, body, request, wait)
        except (TimeoutError, openai.APIConnectionError) as error:
            cause = error.__cause__ or error
            name = type(cause).__name__
            if name.startswith("Connect"):  # of the HTTP library below the client
                raise Unanswered(f"cannot connect: {cause or name}", connected=False) from error
            if isinstance(error, TimeoutError | openai.APITimeoutError):
                raise Unanswered(f"no answer in {self._judge.timeout:g} s") from error
            what = f"connection lost: {name} {cause}".rstrip()
            raise Unanswered(what, connected=bool(self._judge.counts["completions"])) from error
        except Exception as error:
            what = f"cannot be used: {type(error).__name__}: {self._short(str(error))}"
            raise self._permanent(what, "check the address") from error
        return self._completion(text, request)

    def _completion(self, text: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return the body if it has choices, even unreadable ones: it is paid for."""
        body = self._hidden(body_of(text))
        error = error_object(body)
        if isinstance(body, dict) and "choices" in body and not body.get("error"):
            finish = str(at(body, "choices", 0, "finish_reason")).lower()
            if finish in GIVEN_UP:
                raise Unanswered(f"the server gave the answer up: finish_reason {finish}")
            self._judge.counts["completions"] += 1
            return body
        code = str(error.get("code"))
        if code.isdecimal() and 400 <= int(code) < 600:
            return self._refusal(int(code), error, request)  # of a server behind this one
        what = f"HTTP 200, but no chat completion: {self._short(text)}"
        if self._judge.counts["completions"]:
            raise Unanswered(what)
        raise self._permanent(f"does not complete chats: {what}", HINTS[404])

    def _refusal(
        self, status: int, body: Any, request: dict[str, Any], wait: float = 0.0
    ) -> dict[str, Any]:
        """Return {"refused": reason} if the server refuses this text only, else raise."""
        error = error_object(body)
        code = str(error.get("code"))[:READ]
        words = str(error.get("message") or error or body)[:READ]
        reason = f"HTTP {status}: {self._short(words)}"
        if status in (400, 413, 422) and TEXT.search(f"{code} {words}"):
            return {"refused": reason}
        proven = self._judge.counts["completions"] > 0
        change = change_for(f"{error.get('param')} {words}", request) if error else ""
        if (
            status in (400, 422, 500, 501)
            and change
            and (change in self._judge.changes or not proven)
        ):
            raise Unanswered(reason, change=change)
        if wait > LONGEST_WAIT:
            what = f"requests a wait of {wait:.0f} s: {reason}"
            raise self._permanent(what, "repeat the same command after that time")
        spent = status == 429 and QUOTA.search(f"{code} {error.get('type')}")
        if (status in RETRIED or status >= 500) and not spent:
            raise Unanswered(reason, wait)
        if status in (400, 413, 422) and proven:  # the settings are right, so it is the text
            return {"refused": reason}
        hint = HINTS.get(status, "correct the setting that it names")
        hint = NO_TEMPLATE if "chat template" in words else hint
        fix = hint.format(key=self._judge.api_key_env or "judge.api_key_env")
        raise self._permanent(f"refused the request: {reason}", fix)

    def _short(self, text: str) -> str:
        return " ".join(hide(text, self._secret).split())[:SHOWN]

    def _hidden(self, body: Any) -> Any:
        """Remove the key from all strings of a body: some servers repeat it."""
        if isinstance(body, dict):
            return {hide(name, self._secret): self._hidden(part) for name, part in body.items()}
        if isinstance(body, list):
            return [self._hidden(part) for part in body]
        return hide(body, self._secret) if isinstance(body, str) else body
