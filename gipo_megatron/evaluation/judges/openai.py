"""A language model as the judge, behind any OpenAI-compatible endpoint: hosted, or `vllm serve` on
one's own machine."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, final
from urllib.parse import urlsplit

import httpx2

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges import prompts
from gipo_megatron.evaluation.judges.cache import Answer, AnswerCache, request_key
from gipo_megatron.evaluation.judges.endpoint import Endpoint, Unanswered
from gipo_megatron.evaluation.types import FAILED, Comparison, Verdict
from gipo_megatron.recipe.registry import Range, from_runtime, register

CACHE = "judge_cache.jsonl"
# requests in a row that no retry saved (or as many as are in flight, if that is more): the server
# is gone
DEAD_AFTER = 4


@final
@register("judge", "openai")
@dataclass
class OpenAIJudge:
    """Asks for an explanation and a last line [[A]], [[B]] or [[C]].

    Every answer is on disk (judge_cache.jsonl) before the next is asked for in its place. An answer
    without a verdict, or cut at max_tokens, is FAILED, and kept as such; a request that no retry
    saved is FAILED too, and asked again by the next run.
    """

    model: str  # as the endpoint calls it
    base_url: str = "https://api.openai.com/v1"
    # the environment variable with the key; "" for a server that asks for none
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Annotated[int, Range(1)] = 8  # requests in flight
    # null: left to the server (some models refuse it)
    temperature: Annotated[float, Range(0)] | None = 0.0
    max_tokens: Annotated[int, Range(0)] = 1024  # of an answer; 0: left to the server
    timeout: Annotated[float, Range(0, open=True)] = 120.0  # seconds for one attempt
    retries: Annotated[int, Range(0)] = 6  # after 429, 5xx, a time-out, a dropped connection
    # seconds before the first retry, doubled each time, with jitter; Retry-After goes before it
    backoff: Annotated[float, Range(0)] = 1.0
    prompt_price: Annotated[float, Range(0)] = 0.0  # US dollars for a million tokens
    completion_price: Annotated[float, Range(0)] = 0.0
    directory: Any = from_runtime("directory")

    name = "openai"

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                "no address of a server",
                where="judge.base_url",
                fix="such as http://localhost:8000/v1",
            )
        if "@" in url.netloc or url.query:
            fix = "put the key into an environment variable, and its name into judge.api_key_env"
            raise UserError(
                "the address holds a password or a query", where="judge.base_url", fix=fix
            )
        self.counts: Counter[str] = Counter()

    @cached_property
    def cache(self) -> AnswerCache:
        """Opened when it is first needed: a recipe is checked without a run folder."""
        return AnswerCache(Path(self.directory) / CACHE)

    def judge(
        self, comparisons: Sequence[Comparison], done: Callable[[int], None]
    ) -> list[Verdict]:
        """Raises UserError when the server is gone or refuses the set-up; all it answered is in the
        cache then, and in no other place."""
        requests = [self._request(comparison) for comparison in comparisons]
        keys = [request_key(request) for request in requests]
        missing = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if self.cache.get(key) is None
        }
        fresh, uses, lost = set(missing), Counter(keys), dict[str, str]()
        done(sum(count for key, count in uses.items() if key not in fresh))
        if missing:
            secret = self.secret()
            asyncio.run(_Round(self, secret, lambda key: done(uses[key]), lost).ask_all(missing))
        verdicts = []
        for key in keys:
            answer = self.cache.get(key)
            verdicts.append(
                self._verdict(answer, key not in fresh)
                if answer is not None
                else Verdict(FAILED, lost[key])
            )
            fresh.discard(key)  # a pair that stands here twice was asked once
        self.counts["failed"] += sum(verdict.choice == FAILED for verdict in verdicts)
        self.counts["from_cache"] += sum(verdict.cached for verdict in verdicts)
        return verdicts

    def about(self) -> dict[str, Any]:
        """Tokens and cost: of all answers of this model in this run folder; `this_run`: of this
        process."""
        answers = list(self.cache.of(self.model))
        prompt, completion = (
            sum(a.prompt_tokens for a in answers),
            sum(a.completion_tokens for a in answers),
        )
        counts = {
            name: self.counts[name] for name in ("answered", "from_cache", "failed", "attempts")
        }
        settings = {
            "model": self.model,
            "base_url": self.base_url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        about: dict[str, Any] = {
            "name": self.name,
            **settings,
            "prompts": prompts.fingerprint(),
            "answers": len(answers),
        }
        about |= {"prompt_tokens": prompt, "completion_tokens": completion, "this_run": counts}
        if self.prompt_price or self.completion_price:
            about["cost_usd"] = round(
                (prompt * self.prompt_price + completion * self.completion_price) / 1e6, 6
            )
        return about

    def _request(self, comparison: Comparison) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self.model, "messages": prompts.messages(comparison)}
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.max_tokens:
            request["max_tokens"] = self.max_tokens
        return request

    def _verdict(self, answer: Answer, cached: bool) -> Verdict:
        choice, said = prompts.choice(answer.said), answer.said
        if answer.finish == "length":
            choice, said = None, f"(cut at max_tokens, so without a verdict) {said}"
        elif answer.finish == "refused":
            choice = None
        elif choice is None:
            said = f"(no verdict; finish_reason {answer.finish or 'not given'}) {said}"
        return Verdict(
            choice or FAILED, said, answer.prompt_tokens, answer.completion_tokens, cached
        )

    def secret(self) -> str:
        """The key, read where it is needed and kept by no object that is shown."""
        if not self.api_key_env:
            return ""
        secret = os.environ.get(self.api_key_env, "").strip()
        if not secret or not secret.isascii() or not secret.isprintable():
            what = "is not set" if not secret else "holds characters that no key has"
            fix = (
                f'export {self.api_key_env}=…, or judge.api_key_env="" for a server that asks for'
                " no key"
            )
            raise UserError(
                f"the environment variable {self.api_key_env} {what}",
                where="judge.api_key_env",
                fix=fix,
            )
        return secret


class _Round:
    """One call of judge(): `concurrency` workers ask what is missing, each answer kept as it comes.

    When one of them finds the server gone, none asks anew; requests in flight are waited for and
    kept.
    """

    def __init__(
        self, judge: OpenAIJudge, secret: str, answered: Callable[[str], None], lost: dict[str, str]
    ) -> None:
        self._judge, self._secret, self._answered, self._lost = judge, secret, answered, lost
        self._lost_in_a_row = 0
        self._problem: UserError | None = None
        self._stop = asyncio.Event()

    async def ask_all(self, missing: dict[str, dict[str, Any]]) -> None:
        judge = self._judge
        workers = min(judge.concurrency, len(missing))
        async with httpx2.AsyncClient(
            timeout=judge.timeout, limits=httpx2.Limits(max_connections=workers)
        ) as client:
            endpoint = Endpoint(
                client,
                judge.base_url.rstrip("/"),
                self._secret,
                judge.timeout,
                judge.retries,
                judge.backoff,
                random.Random(),
                self._stop,
            )
            left = iter(missing.items())
            await asyncio.gather(*(self._work(endpoint, left) for _ in range(workers)))
            judge.counts["attempts"] += endpoint.attempts
        if self._problem is not None:
            raise self._problem

    async def _work(self, endpoint: Endpoint, left: Iterator[tuple[str, dict[str, Any]]]) -> None:
        for key, request in left:
            if self._stop.is_set():
                return
            try:
                answer = await endpoint.ask(request)
                self._judge.cache.put(key, self._judge.model, answer)
            except Unanswered as failure:
                self._give_up(key, failure)
            except UserError as problem:
                self._end(problem)
            else:
                self._lost_in_a_row = 0
                self._judge.counts["answered"] += 1
                self._answered(key)

    def _give_up(self, key: str, failure: Unanswered) -> None:
        self._lost[key] = str(failure)
        self._lost_in_a_row += 1
        self._answered(key)
        if failure.unreachable or self._lost_in_a_row >= max(DEAD_AFTER, self._judge.concurrency):
            what, kept = f"the judge's server answers no more: {failure}", len(self._judge.cache)
            fix = (
                f"start it again, then the same command: {kept} answers are kept and not asked for"
                " again"
            )
            self._end(UserError(what, where=f"judge.base_url {self._judge.base_url}", fix=fix))

    def _end(self, problem: UserError) -> None:
        """The first problem is the one to tell; what came after it may follow from it."""
        self._problem = self._problem or problem
        self._stop.set()
