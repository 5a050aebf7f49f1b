"""A language model as judge behind an OpenAI-compatible server, hosted or `vllm serve`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges import prompts
from gipo_megatron.evaluation.judges.answers import Answer, read_answer
from gipo_megatron.evaluation.judges.cache import ReplyCache, request_key
from gipo_megatron.evaluation.types import FAILED, Judge, Pair, Verdict
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.web import address_problem, key_of

CACHE = "judge_cache.jsonl"


@final
@register("judge", "openai")
@dataclass
class OpenAIJudge(Judge):
    """The model explains its choice and gives its verdict: as JSON of a schema to which the server
    restricts the answer, or as text that ends with [[A]], [[B]] or [[C]].

    Every reply is written to judge_cache.jsonl before it is read. An answer without a verdict is
    FAILED and kept; one that was cut is requested again with another max_tokens; a request that
    failed after all retries is FAILED too, and is sent again by the next run. A setting that the
    server refuses is changed for the run (chat_refusals.CHANGES).
    """

    model: str  # the endpoint's name of the model
    base_url: str = "https://api.openai.com/v1"
    # the environment variable with the key; "" for a server without keys
    api_key_env: str = "OPENAI_API_KEY"
    answer: Annotated[str, OneOf(*prompts.FORMS)] = "json"  # form that is requested; both are read
    concurrency: Annotated[int, Range(1)] = 8  # requests in flight
    # null: the server's default (some models refuse the setting)
    temperature: Annotated[float, Range(0)] | None = 0.0
    max_tokens: Annotated[int, Range(0)] = 1024  # of an answer; 0: the server's default
    timeout: Annotated[float, Range(0, open=True)] = 120.0  # seconds for one attempt
    retries: Annotated[int, Range(0)] = 6  # after 429, 5xx, a time-out, a dropped connection
    # seconds before the first retry, doubled each time, with jitter; a Retry-After of up to 120 s
    # takes precedence, a longer one ends the evaluation
    backoff: Annotated[float, Range(0)] = 1.0
    directory: Any = from_runtime("directory")

    name: ClassVar[str] = "openai"
    transport: ClassVar[tuple[str, ...]] = (
        "base_url", "api_key_env", "concurrency", "max_tokens", "timeout", "retries", "backoff",
    )  # fmt: skip

    def __post_init__(self) -> None:
        where = "judge.base_url"
        if what := address_problem(self.base_url):
            fix = (
                "use an address such as http://localhost:8000/v1; a key belongs into an"
                " environment variable, and its name into judge.api_key_env"
            )
            raise UserError(what, where=where, fix=fix)
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            fix = f"use {self.base_url.rpartition('/chat/completions')[0]}"
            raise UserError("is the address of one route", where=where, fix=fix)
        self.counts: Counter[str] = Counter()
        self.changes: list[str] = []  # of requests, after a refusal

    @cached_property
    def cache(self) -> ReplyCache:
        """Open the cache on first use: a recipe is checked without a run folder."""
        return ReplyCache(Path(self.directory) / CACHE)

    def check_ready(self) -> None:
        self.secret()

    def judge(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> list[Verdict | None]:
        """Raise UserError if the server is unreachable or refuses the settings.

        All replies received before that are in the cache.
        """
        from gipo_megatron.evaluation.chat_requests import Requests  # imports the openai client

        requests = [self._request(pair) for pair in pairs]
        keys = [request_key(request) for request in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if self._kept(k) is None}
        fresh, uses = set(missing), Counter(keys)
        done(sum(count for key, count in uses.items() if key not in fresh))
        failed: dict[str, str] = {}
        if missing:
            sending = Requests(self, self.secret(), missing, lambda key: done(uses[key]))
            failed = asyncio.run(sending.send_all())
        verdicts: list[Verdict | None] = []
        for key in keys:
            answer = self._kept(key)
            if answer is None:
                verdict = Verdict(FAILED, failed[key])
            else:
                verdict = _verdict(answer, cached=key not in fresh)
            fresh.discard(key)  # a pair that occurs twice in `pairs` was sent once
            self.counts["failed"] += verdict.choice == FAILED
            self.counts["from_cache"] += verdict.cached
            verdicts.append(verdict)
        return verdicts

    def _kept(self, key: str) -> Answer | None:
        """Return the stored answer; None without one, or if another max_tokens may complete it."""
        reply = self.cache.get(key)
        answer = read_answer(reply.body, self.answer) if reply else None
        if reply and answer and answer.cut and reply.max_tokens != self.max_tokens:
            return None
        return answer

    def about(self) -> dict[str, Any]:
        """Return settings and tokens of all answers of this model in this run folder.

        `this_run`: the counts of this process.
        """
        replies = [reply for reply in self.cache.all if reply.model == self.model]
        answers = [read_answer(reply.body, self.answer) for reply in replies]
        return {
            "name": self.name,
            "model": self.model,
            "base_url": self.base_url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "answer": self.answer,
            "prompts": prompts.fingerprint(self.answer),
            "changes": sorted({change for reply in replies for change in reply.changes}),
            "answers": len(answers),
            "prompt_tokens": sum(a.prompt_tokens for a in answers),
            "completion_tokens": sum(a.completion_tokens for a in answers),
            "this_run": {
                name: self.counts[name] for name in ("answered", "from_cache", "failed", "attempts")
            },
        }

    def _request(self, pair: Pair) -> dict[str, Any]:
        messages = prompts.messages(pair, self.answer)
        request: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.answer == "json":
            request["response_format"] = prompts.JSON
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.max_tokens:
            request["max_tokens"] = self.max_tokens
        return request

    def secret(self) -> str:
        """Return the key; "" for a server without keys."""
        secret = key_of(self.api_key_env) if self.api_key_env else ""
        if secret or not self.api_key_env:
            return secret or ""
        what = "contains characters that no key has" if secret is None else "is not set"
        raise UserError(
            f"the environment variable {self.api_key_env} {what}",
            where="judge.api_key_env",
            fix=f'export {self.api_key_env}=…, or judge.api_key_env="" for a server without keys',
        )


def _verdict(answer: Answer, cached: bool) -> Verdict:
    text = f"({answer.fault}) {answer.text}" if answer.fault else answer.text
    tokens = (answer.prompt_tokens, answer.completion_tokens)
    return Verdict(answer.choice or FAILED, text, *tokens, cached)
