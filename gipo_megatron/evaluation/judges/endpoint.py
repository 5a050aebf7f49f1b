"""One OpenAI-compatible endpoint: a request becomes an answer, is tried again, or is given up.
Knows nothing of pairs or verdicts."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges.cache import Answer

LONGEST_BACKOFF = 60.0  # seconds; a Retry-After may be longer
AGAIN = (408, 409, 425, 429)  # besides 5xx: the same request may succeed later
# a 400 about this request, not about the set-up
REFUSED_CODES = ("content_filter", "content_policy_violation", "context_length_exceeded")
# where a server gives no such code
REFUSED_WORDS = ("maximum context length", "content management policy")
SHOWN = 300  # characters of a server's words


class Unanswered(Exception):
    """No answer after all retries; the message is the last reason. `unreachable`: nobody listens
    there at all."""

    def __init__(self, reason: str, unreachable: bool) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class _Again(Exception):
    """This attempt failed in a way that another may not; `wait`: the seconds that the server asked
    for."""

    def __init__(self, reason: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


@dataclass
class Endpoint:
    """POST {base_url}/chat/completions. `key` goes into one header and nowhere else. `noise` is the
    jitter's own generator."""

    client: httpx2.AsyncClient
    base_url: str
    key: str
    timeout: float  # seconds for one whole attempt
    retries: int
    # seconds before the first retry, then doubled each time; jitter takes up to half of it away
    backoff: float
    noise: random.Random
    stop: asyncio.Event  # when set: no more retries, and nobody waits for one
    attempts: int = 0

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Raises Unanswered after all retries, and UserError for what no retry can mend (a wrong
        key, model or setting)."""
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(request)
            except _Again as failure:
                if attempt == self.retries or await self._stopped_within(
                    self._pause(attempt, failure.wait)
                ):
                    raise Unanswered(
                        f"no answer after {attempt + 1} attempts: {failure}", failure.unreachable
                    ) from failure
        raise AssertionError("range(retries + 1) is not empty")

    def _pause(self, attempt: int, asked: float) -> float:
        backoff = min(LONGEST_BACKOFF, self.backoff * 2**attempt)
        jitter = self.noise.random() / 2
        return asked + backoff * jitter if asked else backoff * (1 - jitter)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _attempt(self, request: dict[str, Any]) -> Answer:
        self.attempts += 1
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        # pure ASCII: the client's own way cannot send half of a surrogate pair
        content = json.dumps(request).encode()
        try:
            # the client's own time-outs are for each read, and a server may trickle
            async with asyncio.timeout(self.timeout):
                response = await self.client.post(
                    f"{self.base_url}/chat/completions", content=content, headers=headers
                )
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _Again(f"no answer in {self.timeout:g} s") from error
        except httpx2.ConnectError as error:
            raise _Again(f"cannot connect: {error}", unreachable=True) from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Again(f"connection lost: {type(error).__name__} {error}".rstrip()) from error
        return self._read(response)

    def _read(self, response: httpx2.Response) -> Answer:
        status = response.status_code
        if status == 200:
            return self._answer(response)
        words, code = self._words(response)
        if status in AGAIN or status >= 500:
            raise _Again(
                f"HTTP {status}: {words}",
                wait=_retry_after(response.headers.get("Retry-After", "")),
            )
        if status in (400, 413) and (
            code in REFUSED_CODES or any(part in words for part in REFUSED_WORDS)
        ):
            return Answer(f"HTTP {status}: {words}", "refused")
        hints = {
            401: "check the key",
            403: "check the key and its rights",
            404: "check judge.base_url (it ends in /v1) and judge.model",
        }
        raise UserError(
            f"the judge's server refused the request: HTTP {status}: {words}",
            where=f"{self.base_url}, judge.name openai",
            fix=hints.get(
                status, "mend the setting that it names; what is answered so far is kept"
            ),
        )

    def _answer(self, response: httpx2.Response) -> Answer:
        """A body that is no chat completion comes from something between here and the model: it is
        asked again."""
        try:
            body = response.json()
            picked = body["choices"][0]
            said = picked["message"].get("content")
            usage = body.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if said is not None and not isinstance(said, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Again(
                f"HTTP 200, but no chat completion: {self._hide(response.text)}"
            ) from error
        return Answer(
            self._hide(said or "", len(said or "")), str(picked.get("finish_reason") or ""), *tokens
        )

    def _words(self, response: httpx2.Response) -> tuple[str, str]:
        """(what the server says, its error code): `{"error": {"message", "code"}}` where it follows
        the standard."""
        try:
            error = response.json()["error"]
            words, code = (
                (str(error["message"]), str(error.get("code")))
                if isinstance(error, dict)
                else (str(error), "")
            )
        except (ValueError, KeyError, TypeError):
            words, code = response.text, ""
        return self._hide(words), code

    def _hide(self, text: str, size: int = SHOWN) -> str:
        """Some servers repeat the key they were given."""
        return (text.replace(self.key, "…") if self.key else text)[:size]


def _retry_after(value: str) -> float:
    """Seconds, given as such or as a date; 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
