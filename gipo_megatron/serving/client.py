"""HTTP client of a vLLM server (0.32): token ids in, token ids and log-probs out.

Two kinds of errors: ServerLost, which a restart may cure, and UserError, which would come again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from gipo_megatron.errors import UserError
from gipo_megatron.http_client import HttpClient
from gipo_megatron.screen import hide
from gipo_megatron.web import at, key_of, read_json

GENERATE = "/inference/v1/generate"
# vLLM has each group of routes only where an option or a variable turns it on
SCALE_OUT = "--enable-scale-out"
ROUTES = {
    GENERATE: SCALE_OUT,
    "/pause": "VLLM_SERVER_DEV_MODE=1",
    "/update_weights": "VLLM_SERVER_DEV_MODE=1",
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1",
}
LOGPROBS = "processed_logprobs"  # after temperature, top_k and top_p
PLUGIN = 1  # version of the protocol with serving/plugin
TESTED = "vLLM 0.32 is the version that was tested"
KEY = "VLLM_API_KEY"  # the environment variable with the server's key
CONNECT = 10.0  # seconds until a connection is there
HEALTH = 5.0  # seconds between two looks at the server's health during a request
CONNECTIONS = 256  # requests at a time, as many as vLLM works on by default
NO_LOGPROB = -9999.0  # vLLM's number for a log-prob that is NaN or -inf
FINISHED = ("stop", "length")
LONGEST_REASON = 500  # characters of a server's message that are shown
T = TypeVar("T")


class ServerLost(Exception):
    """The server died, hung, ran out of memory or cannot be reached."""


@dataclass(frozen=True)
class Request:
    """One response to a prompt. `sampling`: vLLM's `sampling_params`."""

    token_ids: Sequence[int]
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A response; its last token may be an end token. `version`: of the weights that drew it;
    several joined by "+", which no version holds, where they changed meanwhile."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, under the distribution it was drawn from
    finish: str  # stop: an end token was drawn | length
    version: str


@dataclass(frozen=True)
class Needed:
    """Properties that a server must have. `tokens`: the longest prompt and response together;
    `token_ids`: our tokenizer's of `text`."""

    tokens: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    text: str
    token_ids: Sequence[int]


class Client:
    """One server at `url`. `timeout`: seconds without any finished response, and of any other
    request.

    $VLLM_API_KEY is sent where it is set; vLLM's server reads the same variable. Proxies of the
    environment are not used: they are for other machines than a cluster's own.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        key = key_of(KEY)
        if key is None:
            what = f"the environment variable {KEY} contains characters that no key has"
            raise UserError(what, where=self.url, fix=f"export {KEY}=… of the server")
        self._settings: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "trust_env": False,
            # the server closes a connection after an error, and one that was idle for 5 s
            "limits": httpx2.Limits(max_keepalive_connections=0),
            "timeout": httpx2.Timeout(None, connect=min(CONNECT, timeout)),
            "verify": httpx2.create_ssl_context(),  # made once: it takes longer than a request
        }

    def get(self, route: str, **query: Any) -> Any:
        """Return the JSON of the answer. Raises ServerLost and UserError, as all requests here."""
        return _read(asyncio.run(self._send("GET", route, params=query)))

    def post(self, route: str, body: Any = None, **query: Any) -> Any:
        """Return the JSON of the answer; None where it is empty. Threads may share a client."""
        sending = self._send("POST", route, json=body, params=query)
        return _read(asyncio.run(self._while_healthy(sending)))

    def healthy(self) -> bool:
        """Check whether the server answers, within CONNECT seconds, that its engine runs."""
        return asyncio.run(self._healthy())

    async def _healthy(self) -> bool:
        try:
            return (await self._send("GET", "/health", limit=CONNECT)).is_success
        except (ServerLost, UserError):
            return False

    async def _send(
        self, method: str, route: str, *, limit: float | None = None, **content: Any
    ) -> httpx2.Response:
        """Send one request; `limit`: seconds for all of it, `timeout` by default."""
        seconds = self.timeout if limit is None else limit
        with _errors(self.url, seconds):
            async with asyncio.timeout(seconds), HttpClient(**self._settings) as http:
                return await http.request(method, route, **content)

    async def _while_healthy(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. Raises ServerLost where the server is found unhealthy twice
        meanwhile: vLLM's server does not end open requests when its engine has died."""
        task, failed = asyncio.create_task(work), 0
        try:
            while not (await asyncio.wait({task}, timeout=HEALTH))[0]:
                failed = 0 if await self._healthy() else failed + 1
                if failed == 2:
                    raise ServerLost(f"{self.url}: its engine has died; it answers no more")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check(self, needed: Needed) -> None:
        """Raise UserError where this is no server, or not the one, that a run needs; ServerLost
        where it does not answer."""
        models = self.get("/v1/models")
        length = at(models, "data", 0, "max_model_len")
        if not isinstance(length, int):
            what = f"no vLLM server: /v1/models has no max_model_len: {str(models)[:200]}"
            raise UserError(what, where=self.url, fix=f"a vLLM server; {TESTED}")
        self._check_routes()
        if length < needed.tokens:
            raise UserError(
                f"the server takes {length} tokens, prompt and response together;"
                f" {needed.tokens} are needed",
                where=self.url,
                fix=f"start it with --max-model-len {needed.tokens} or more, or shorten"
                " data.max_length or algorithm.rollout.max_response",
            )
        self._check_model(needed)
        body = {"prompt": needed.text, "add_special_tokens": False}
        if at(self.post("/tokenize", body), "tokens") != list(needed.token_ids):
            raise UserError(
                "the server has another tokenizer: other token ids for the same text",
                where=self.url,
                fix="start it with the tokenizer of this run (--tokenizer FOLDER)",
            )

    def _check_routes(self) -> None:
        """Look for each route with a method it does not have: 405 where there is one, else 404."""
        for route, option in ROUTES.items():
            status = asyncio.run(self._send("GET", route)).status_code
            if status == httpx2.codes.NOT_FOUND:
                fix = f"start it with {SCALE_OUT} and VLLM_SERVER_DEV_MODE=1"
                what = f"the server has no {route}: it was started without {option}"
                raise UserError(what, where=self.url, fix=fix)

    def _check_model(self, needed: Needed) -> None:
        try:
            found = self.post("/collective_rpc", {"method": "gipo_describe"})
        except ServerLost:
            if not self.healthy():
                raise
            found = None  # a method that vLLM's workers do not have: HTTP 500
        found = at(found, "results", 0)
        if at(found, "plugin") != PLUGIN:
            raise UserError(
                f"the server runs without version {PLUGIN} of this project's plugin",
                where=self.url,
                fix="start it as docs/rollout.md shows: PYTHONPATH=…/gipo_megatron/serving/plugin"
                " and --worker-extension-cls gipo_vllm_worker.Extension",
            )
        sizes = ("vocab_size", "hidden_size", "num_layers")
        wrong = [name for name in sizes if at(found, name) != getattr(needed, name)]
        if wrong:
            pairs = [f"{name} {at(found, name)}, not {getattr(needed, name)}" for name in wrong]
            what = f"the server has another model: {'; '.join(pairs)}"
            raise UserError(what, where=self.url, fix="start it with the actor's model")
        if (mode := at(found, "logprobs_mode")) != LOGPROBS:
            raise UserError(
                f"the server's log-probs are {mode}, not of the distribution that tokens are drawn"
                " from",
                where=self.url,
                fix=f"start it with --logprobs-mode {LOGPROBS}",
            )

    def generate(self, requests: Sequence[Request], answers: dict[int, Answer]) -> None:
        """Send each request whose index is not in `answers`, and put its answer there.

        Raises ServerLost or UserError; answers that came before stay in `answers`.
        """
        missing = {i: request for i, request in enumerate(requests) if i not in answers}
        asyncio.run(self._while_healthy(self._generate(missing, answers)))

    async def _generate(self, missing: dict[int, Request], answers: dict[int, Answer]) -> None:
        # a request waits here, not in the pool of httpx2, whose work grows with its queue
        free = asyncio.Semaphore(CONNECTIONS)
        async with HttpClient(**self._settings) as http:

            async def send(index: int, request: Request) -> None:
                body = {"token_ids": list(request.token_ids), "sampling_params": request.sampling}
                async with free:
                    with _errors(self.url, self.timeout):
                        response = await http.post(GENERATE, json=body)
                answer = read_answer(_read(response), self.url)
                self._refuse_cut(request, answer)
                answers[index] = answer

            tasks = {asyncio.create_task(send(*item)) for item in missing.items()}
            try:
                await self._finish(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse_cut(self, request: Request, answer: Answer) -> None:
        """Raise UserError for a response that ended at the server's limit, which is no error to
        vLLM."""
        limit, found = request.sampling["max_tokens"], len(answer.token_ids)
        if found > limit or (found < limit and answer.finish == "length"):
            fix = f"start it with --max-model-len {len(request.token_ids) + limit} or more"
            what = f"the server cut a response after {found} tokens, where {limit} were requested"
            raise UserError(what, where=self.url, fix=fix)

    async def _finish(self, tasks: set[asyncio.Task[None]]) -> None:
        """Wait for all tasks, at most `timeout` seconds for the next one that ends. Raise the first
        error."""
        left = set(tasks)
        while left:
            done, left = await asyncio.wait(
                left, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                what = f"none of {len(left)} responses was finished in {self.timeout:g} s"
                raise ServerLost(f"{self.url}: {what}")
            for task in done:
                task.result()


def read_answer(body: Any, url: str) -> Answer:
    """Return the one response in an answer of GENERATE. Raises UserError for a malformed one."""
    choice = at(body, "choices", 0)
    tokens, finish = at(choice, "token_ids"), at(choice, "finish_reason")
    entries = at(choice, "logprobs", "content")
    spans = at(choice, "weight_versions")
    if finish not in FINISHED:
        fix = "let no other program pause the server or abort its requests"
        what = f"a response ended with finish_reason {finish!r}, not one of {', '.join(FINISHED)}"
        raise UserError(what, where=url, fix=fix)
    if not (isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens)):
        raise _malformed(f"token_ids are {str(tokens)[:80]}", url)
    if not isinstance(entries, list) or len(entries) != len(tokens):
        found = len(entries) if isinstance(entries, list) else "no"
        raise _malformed(f"{found} log-probs of {len(tokens)} tokens", url)
    if [at(entry, "token_id") for entry in entries] != tokens:
        raise _malformed("the log-probs are of other tokens", url)
    logprobs = [at(entry, "logprob") for entry in entries]
    for value in logprobs:
        number = isinstance(value, int | float) and math.isfinite(value) and value > NO_LOGPROB
        if not number:
            raise _malformed(f"a log-prob is {value!r}, not finite", url)
    versions = {at(span, "version") for span in spans} if isinstance(spans, list) else set()
    if not versions or not all(isinstance(version, str) for version in versions):
        raise _malformed(f"weight_versions are {str(spans)[:80]}", url)
    return Answer(tuple(tokens), tuple(map(float, logprobs)), finish, "+".join(sorted(versions)))


def _malformed(what: str, url: str) -> UserError:
    return UserError(f"malformed answer of {GENERATE}: {what}", where=url, fix=TESTED)


def _read(response: httpx2.Response) -> Any:
    """Return the JSON of an answer; None where it is empty. Raises ServerLost for HTTP 5xx,
    UserError for any other status but 2xx, and for what is no JSON."""
    place = f"{response.request.method} {response.request.url}"
    if response.is_server_error:
        raise ServerLost(f"{place}: HTTP {response.status_code}: {_reason(response)}")
    if not response.is_success:
        what = f"the server refused a request: HTTP {response.status_code}: {_reason(response)}"
        keys = (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN)
        fix = f"export {KEY}=… of the server" if response.status_code in keys else TESTED
        raise UserError(what, where=place, fix=fix)
    try:
        return read_json(response.text) if response.content else None
    except ValueError as error:
        what = f"the server's answer is no JSON: {_hidden(response.text)[:80]!r}"
        raise UserError(what, where=place, fix=f"a vLLM server; {TESTED}") from error


def _reason(response: httpx2.Response) -> str:
    """Return the message of an error, which vLLM puts into {"error": {"message": …}}, {"error": …}
    or {"detail": …}; the text where it is something else."""
    try:
        body = read_json(response.text)
    except ValueError:
        body = response.text
    error = at(body, "error") or at(body, "detail") or body
    return " ".join(_hidden(str(at(error, "message") or error)).split())[:LONGEST_REASON]


def _hidden(text: str) -> str:
    """Remove the key: some servers repeat it in their messages."""
    return hide(text, key_of(KEY) or "")


@contextmanager
def _errors(url: str, timeout: float) -> Iterator[None]:
    """Turn the errors of httpx2 into ServerLost, and a URL that is none into UserError."""
    try:
        yield
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        what = f"no URL of a server: {error}"
        raise UserError(what, where=url, fix="algorithm.rollout.url=http://HOST:PORT") from error
    except (TimeoutError, httpx2.TimeoutException) as error:
        kind = type(error).__name__
        raise ServerLost(f"{url} does not answer: {kind} (limit {timeout:g} s)") from error
    except httpx2.RequestError as error:
        raise ServerLost(f"{url}: {type(error).__name__}: {error}") from error
