"""Send chat requests through the `openai` client, several at a time, each with retries.

The client's own retries are off: ours stop as soon as the server is found dead, limit the time of
a whole attempt, and also retry a body that is not a chat completion (a proxy's error page).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import openai

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges.cache import Answer

if TYPE_CHECKING:
    from gipo_megatron.evaluation.judges.openai import OpenAIJudge

LONGEST_BACKOFF = 60.0  # seconds; a Retry-After may be longer
RETRIED = (408, 409, 425, 429)  # besides 5xx
# error codes, or words where a server gives no code, of a 400 that concerns this request only
REFUSED_CODES = ("content_filter", "content_policy_violation", "context_length_exceeded")
REFUSED_WORDS = ("maximum context length", "content management policy")
HINTS = {
    401: "check the key",
    403: "check the key and its rights",
    404: "check judge.base_url (it ends in /v1) and judge.model",
}
SHOWN = 300  # characters of a server's message
# The server is considered dead after this many failed requests in a row (or `concurrency` many).
DEAD_AFTER = 4


class Unanswered(Exception):
    """A failed attempt; the message is the reason.

    `wait`: seconds until the next attempt that the server requested. `unreachable`: no server
    accepts connections at the address.
    """

    def __init__(self, reason: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


class Requests:
    """`judge.concurrency` workers send `missing` {key: request} and put each answer in the cache.

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

    async def send_all(self) -> dict[str, str]:
        """Return {key: reason} of the requests that failed after all retries.

        Raises UserError if the server is dead or rejects the settings (key, model, address).
        """
        async with openai.AsyncOpenAI(
            api_key=self._secret or "none",
            base_url=self._judge.base_url,
            timeout=self._judge.timeout,
            max_retries=0,
        ) as client:
            await asyncio.gather(*(self._work(client) for _ in range(self._workers)))
        if self._problem is not None:
            raise self._problem
        return self._failed

    async def _work(self, client: openai.AsyncOpenAI) -> None:
        judge = self._judge
        for key, request in self._left:
            if self._stop.is_set():
                return
            try:
                judge.cache.put(key, judge.model, await self._send(client, request))
            except Unanswered as failure:
                self._failed[key] = str(failure)
                self._failed_in_a_row += 1
                self._answered(key)
                limit = max(DEAD_AFTER, judge.concurrency)
                if failure.unreachable or self._failed_in_a_row >= limit:
                    self._end(self._dead(failure))
            except UserError as problem:
                self._end(problem)
            else:
                self._failed_in_a_row = 0
                judge.counts["answered"] += 1
                self._answered(key)

    def _dead(self, failure: Unanswered) -> UserError:
        kept = len(self._judge.cache)
        return UserError(
            f"the judge's server does not answer any more: {failure}",
            where=f"judge.base_url {self._judge.base_url}",
            fix=f"restart it, then repeat the same command: {kept} answers are kept and not"
            " requested again",
        )

    def _end(self, problem: UserError) -> None:
        """Stop all workers. The first problem is reported: later ones may follow from it."""
        self._problem = self._problem or problem
        self._stop.set()

    # ------------------------------------------------------------------------------- one request

    async def _send(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Answer:
        """Raise Unanswered after all retries, UserError if a retry cannot help."""
        for attempt in range(self._judge.retries + 1):
            try:
                return await self._attempt(client, request)
            except Unanswered as failure:
                last = attempt == self._judge.retries
                if last or await self._stopped_within(self._pause(attempt, failure.wait)):
                    reason = f"no answer after {attempt + 1} attempts: {failure}"
                    raise Unanswered(reason, unreachable=failure.unreachable) from failure
        raise AssertionError("range(retries + 1) is not empty")

    def _pause(self, attempt: int, requested: float) -> float:
        """Return seconds: exponential with jitter; at least those that the server requested."""
        backoff = min(LONGEST_BACKOFF, self._judge.backoff * 2**attempt)
        jitter = self._noise.random() / 2
        return requested + backoff * jitter if requested else backoff * (1 - jitter)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _attempt(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Answer:
        self._judge.counts["attempts"] += 1
        # ASCII: the client's own encoding fails for half of a surrogate pair
        content = json.dumps(request).encode()
        headers: dict[str, str | openai.Omit] = {"Content-Type": "application/json"}
        if not self._secret:
            headers["Authorization"] = openai.Omit()
        try:
            # the client's time-outs are per read: a server that sends slowly would never time out
            async with asyncio.timeout(self._judge.timeout):
                body = await client.post(
                    "/chat/completions",
                    cast_to=str,
                    content=content,
                    options={"headers": headers},
                )
        except (TimeoutError, openai.APITimeoutError) as error:
            raise Unanswered(f"no answer in {self._judge.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if type(cause).__name__ == "ConnectError":  # of the HTTP library below the client
                raise Unanswered(f"cannot connect: {cause}", unreachable=True) from error
            what = f"connection lost: {type(cause).__name__} {cause}".rstrip()
            raise Unanswered(what) from error
        except openai.APIStatusError as error:
            return self._refusal(error)
        return self._answer(body)

    def _refusal(self, error: openai.APIStatusError) -> Answer:
        """Return an Answer if the server refuses this text only, else raise."""
        status, body = error.status_code, error.body
        code = str(body.get("code")) if isinstance(body, dict) else ""
        words = body.get("message") if isinstance(body, dict) else body
        words = self._hide(str(words or error.response.text))
        if status in RETRIED or status >= 500:
            wait = _retry_after(error.response.headers.get("Retry-After", ""))
            raise Unanswered(f"HTTP {status}: {words}", wait)
        refused = code in REFUSED_CODES or any(part in words for part in REFUSED_WORDS)
        if status in (400, 413) and refused:
            return Answer(f"HTTP {status}: {words}", "refused")
        raise UserError(
            f"the judge's server refused the request: HTTP {status}: {words}",
            where=f"{self._judge.base_url}, judge.name openai",
            fix=HINTS.get(status, "correct the setting that it names; answers so far are kept"),
        ) from None

    def _answer(self, body: str) -> Answer:
        """Raise Unanswered for another body: it comes from a proxy, not from the model."""
        try:
            completion = json.loads(body)
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            finish = str(choice.get("finish_reason") or "")
            return Answer(self._hide(text, len(text)), finish, *tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"HTTP 200, but no chat completion: {self._hide(body)}"
            raise Unanswered(what) from error

    def _hide(self, text: str, size: int = SHOWN) -> str:
        """Remove the key: some servers repeat it in their messages."""
        return (text.replace(self._secret, "…") if self._secret else text)[:size]


def _retry_after(value: str) -> float:
    """Return seconds from a number or a date; 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
