"""A server with the used part of vLLM's protocol that really generates, on a tiny model: within a
test (`serving`), or as `serve.command`:

    [python, tests/serving/fake.py, --model, "{model}", --port, "{port}", --fault, die:3]

The weights are those that were pushed, by file or broadcast, as the plugin takes them. Before a
push they are random, as under `--load-format dummy`. A fault is `kind:N`: it sets in after N
responses. With `--once FILE` there is no fault where the file exists, and a fault makes the file;
so a restarted server has none.

    die        the process ends, amid a response      hang       no more answers
    memory     HTTP 500: out of memory                abort      finish_reason "abort"
    stale      the weight version before the pushed   malformed  one log-prob too few
    nan        a log-prob that is not finite          text       an answer that is no JSON
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

GENERATE = "/inference/v1/generate"
DEVELOPMENT = ("/pause", "/resume", "/is_paused", "/collective_rpc", "/start_weight_update")


class Refused(Exception):
    """An error of a request: HTTP status and message."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        kind = {400: "BadRequestError", 500: "InternalServerError"}[status]
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.status, self.body = status, {"error": error}
        super().__init__(message)


def failed(message: str) -> Refused:
    """An exception in a worker, which is an HTTP 500 to vLLM."""
    return Refused(
        500, f"Call to collective_rpc method failed: Worker failed with error '{message}'"
    )


@dataclass
class Options:
    """Settings of a fake server. `routes`: False: as without --enable-scale-out and
    VLLM_SERVER_DEV_MODE; `vocab_size`: 0: the model's."""

    model: Path
    max_model_len: int = 4096
    vocab_size: int = 0
    routes: bool = True
    plugin: int = 1
    logprobs_mode: str = "processed_logprobs"
    tokens: dict[str, list[int]] = field(default_factory=dict)  # of texts; else the model's
    fault: str = ""
    once: Path | None = None


class Engine:
    """The model, its weights and their version."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        self.vocab_size = options.vocab_size or self.config["vocab_size"]
        self.lock = threading.Lock()
        self.running = threading.Event()
        self.running.set()
        self.versions = ["default"]
        self.received: dict[str, Any] | None = None  # during an update
        self.group: Any = None
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The transformers model; its weights are random until some were pushed."""
        if self._model is None:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(self.options.model)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return self._model

    # ---------------------------------------------------------------------------------- weights

    def join(self, info: dict[str, Any]) -> None:
        self.group = None
        if not info.get("host"):
            return
        import torch.distributed as dist

        limit, size = datetime.timedelta(seconds=info["timeout"]), info["world_size"]
        store = dist.TCPStore(
            info["host"], info["port"], size, False, timeout=limit, wait_for_workers=False
        )
        store.set("here/1", "")
        self.group = dist.ProcessGroupGloo(store, 1, size, limit)

    def start(self) -> None:
        if self.received is not None:
            raise failed("start_weight_update called while another update is active.")
        self.received = {}

    def update(self, bucket: dict[str, Any]) -> None:
        if self.received is None:
            raise failed("update_weights called without a matching start_weight_update.")
        import torch
        import torch.distributed as dist

        try:
            names, shapes = bucket["names"], [torch.Size(shape) for shape in bucket["shapes"]]
            dtype, path = getattr(torch, bucket["dtype"]), bucket.get("path", "")
        except KeyError as error:
            self.received = None
            raise failed(f"Invalid update_info: {error}") from error
        sizes = [shape.numel() for shape in shapes]
        flat = (
            torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=dtype)
            if path
            else torch.empty(sum(sizes), dtype=dtype)
        )
        for name, shape, part in zip(names, shapes, flat.split(sizes), strict=True):
            if not path:
                self.group.broadcast([part], dist.BroadcastOptions()).wait()
            self.received[name] = part.view(shape)

    def finish(self, version: str) -> None:
        if self.received is None:
            raise failed("finish_weight_update called without a matching start_weight_update.")
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        parameters = dict(self.model.named_parameters())
        if missing := parameters.keys() - tied - self.received.keys():
            raise failed(f"parameters without weights: {sorted(missing)}")
        import torch

        with torch.no_grad():
            for name, tensor in self.received.items():
                parameters[name].copy_(tensor)
        self.received = None
        self.versions.append(version)

    def call(self, method: str) -> Any:
        """Return what the plugin's method returns on the one worker."""
        if method == "gipo_describe":
            return {
                "plugin": self.options.plugin,
                "vocab_size": self.vocab_size,
                "hidden_size": self.config["hidden_size"],
                "num_layers": self.config["num_hidden_layers"],
                "dtype": "float32",
                "logprobs_mode": self.options.logprobs_mode,
            }
        if method == "gipo_reset":
            self.received = None
            return None
        raise failed(f"'CPUWorker' object has no attribute '{method}'")

    # ------------------------------------------------------------------------------- generation

    def respond(self, ids: list[int], settings: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Return tokens and log-probs of a response, which holds its stop token."""
        import torch

        generator = torch.Generator()
        generator.manual_seed(settings["seed"] or 0)
        limit = min(settings["max_tokens"], self.options.max_model_len - len(ids))
        tokens: list[int] = []
        logprobs: list[float] = []
        with torch.inference_mode():
            while len(tokens) < limit:
                seen = torch.tensor([ids + tokens])
                logits = self.model(seen, use_cache=False).logits[0, -1].double()
                scores = distribution(logits, seen[0], settings)
                if settings["temperature"] == 0:
                    token = int(scores.argmax())
                else:
                    token = int(torch.multinomial(scores.exp(), 1, generator=generator))
                tokens.append(token)
                logprobs.append(float(scores[token]))
                if token in settings["stop_token_ids"]:
                    break
        return tokens, logprobs


def distribution(logits: Any, seen: Any, settings: dict[str, Any]) -> Any:
    """Return the log-probs [V] that a token is drawn from."""
    import torch

    penalty = settings["repetition_penalty"]
    seen = seen.unique()
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits = logits / (settings["temperature"] or 1.0)
    order = logits.argsort(descending=True)
    ranked = logits[order].softmax(0)
    dropped = ranked.cumsum(0) - ranked >= settings["top_p"]
    if settings["top_k"] > 0:
        dropped |= torch.arange(len(order)) >= settings["top_k"]
    logits[order[dropped]] = float("-inf")
    return logits.log_softmax(0)


class Server(ThreadingHTTPServer):
    """`leave`: ends the process where it is one."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, port: int, options: Options, leave: Callable[[], None]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.options, self.engine, self._leave = options, Engine(options), leave
        self.stopped, self.dead = threading.Event(), False
        self.responses = 0  # finished
        self.requests: list[dict[str, Any]] = []  # bodies of GENERATE
        self.keys: set[str] = set()
        fired = options.once is not None and options.once.exists()
        self._kind, _, after = ("" if fired else options.fault).partition(":")
        self._after = int(after or 0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self) -> None:
        self.dead = True
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self._leave()
        self.shutdown()
        self.server_close()

    def fault(self) -> str:
        """Return the fault that the next response has."""
        with self.engine.lock:
            if not self._kind or self.responses < self._after:
                return ""
        if self.options.once is not None:
            self.options.once.touch()
        return self._kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve("GET")

    def do_POST(self) -> None:
        self.serve("POST")

    def serve(self, method: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.keys.add(self.headers.get("Authorization", ""))
        self.close_connection = self.server.dead
        if self.server.dead:
            return
        parts = urlsplit(self.path)
        allowed = ROUTES.get(parts.path)
        if allowed is None or (self.hidden(parts.path) and not self.server.options.routes):
            return self.send(404, {"detail": "Not Found"})
        if allowed[0] != method:
            return self.send(405, {"detail": "Method Not Allowed"})
        body = json.loads(content) if content else None
        try:
            answer = allowed[1](self, body, dict(parse_qsl(parts.query)))
        except Refused as refused:
            return self.send(refused.status, refused.body)
        if not self.close_connection:
            self.send(200, answer)

    @staticmethod
    def hidden(path: str) -> bool:
        return path == GENERATE or path in DEVELOPMENT or path.endswith("weights")

    def send(self, status: int, answer: Any) -> None:
        content = answer or b""
        if not isinstance(content, bytes):
            content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    # --------------------------------------------------------------------------------- routes

    def health(self, body: Any, query: Any) -> Any:
        return None

    def models(self, body: Any, query: Any) -> Any:
        options = self.server.options
        model = {
            "id": "policy",
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": str(options.model),
            "parent": None,
            "max_model_len": options.max_model_len,
        }
        return {"object": "list", "data": [model]}

    def world_size(self, body: Any, query: Any) -> Any:
        return {"world_size": 1}

    def tokenize(self, body: Any, query: Any) -> Any:
        options = self.server.options
        ids = options.tokens.get(body["prompt"])
        if ids is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(options.model)
            ids = tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"]).input_ids
        length = options.max_model_len
        return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": None}

    def pause(self, body: Any, query: Any) -> Any:
        if (mode := query.get("mode", "abort")) not in ("abort", "wait", "keep"):
            raise Refused(400, f"mode {mode}", "query.mode")
        self.server.engine.running.clear()
        return {"status": "paused"}

    def resume(self, body: Any, query: Any) -> Any:
        self.server.engine.running.set()
        return {"status": "resumed"}

    def is_paused(self, body: Any, query: Any) -> Any:
        return {"is_paused": not self.server.engine.running.is_set()}

    def weight_info(self, body: Any, query: Any) -> Any:
        return {"weight_version": self.server.engine.versions[-1]}

    def rpc(self, body: Any, query: Any) -> Any:
        return {"results": [self.server.engine.call(body["method"])]}

    def init(self, body: Any, query: Any) -> Any:
        self.server.engine.join(body["init_info"])
        return {"message": "Weight transfer initialized"}

    def start(self, body: Any, query: Any) -> Any:
        self.server.engine.start()
        return {"message": "Weight update started"}

    def update(self, body: Any, query: Any) -> Any:
        self.server.engine.update(body["update_info"])
        return {"message": "Weights updated"}

    def finish_update(self, body: Any, query: Any) -> Any:
        self.server.engine.finish(body["weight_version"])
        return {"message": "Weight update finished"}

    def reset_cache(self, body: Any, query: Any) -> Any:
        return {"success": True}

    def generate(self, body: Any, query: Any) -> Any:
        server, engine = self.server, self.server.engine
        check(body, engine)
        fault = server.fault()
        if fault == "die":
            server.die()
        if fault in ("die", "hang"):
            server.stopped.wait(60 if fault == "hang" else 0)
            self.close_connection = True
            return None
        if fault == "memory":
            raise Refused(500, "CUDA out of memory. Tried to allocate 2.00 GiB.")
        engine.running.wait(60)
        with engine.lock:
            tokens, logprobs = engine.respond(body["token_ids"], body["sampling_params"])
            version = engine.versions[-2 if fault == "stale" else -1]
            server.responses += 1
            server.requests.append(body)
        answer = written(body, tokens, logprobs, version)
        return misshapen(answer, fault) if fault else answer


def check(body: Any, engine: Engine) -> None:
    """Raise Refused for a request that vLLM refuses."""
    if not isinstance(body, dict):
        raise Refused(400, "Input should be a valid dictionary", "body")
    ids, limit = body["token_ids"], engine.options.max_model_len
    if not ids or min(ids) < 0:
        raise Refused(400, "token_ids", "body.token_ids")
    if len(ids) >= limit:
        raise Refused(400, f"The decoder prompt (length {len(ids)}) is longer than {limit}.")
    if max(ids) >= engine.vocab_size:
        raise Refused(400, f"Token id {max(ids)} is out of vocabulary")
    if max(body["sampling_params"]["stop_token_ids"], default=0) >= engine.vocab_size:
        raise Refused(400, "token_id(s) in stop_token_ids out of vocabulary", "stop_token_ids")
    if body["sampling_params"]["temperature"] < 0:
        raise Refused(400, "temperature must be non-negative", "temperature")


def written(body: Any, tokens: list[int], logprobs: list[float], version: str) -> dict[str, Any]:
    """Return the answer of GENERATE."""
    stop = tokens[-1] if tokens[-1] in body["sampling_params"]["stop_token_ids"] else None
    pairs = zip(tokens, logprobs, strict=True)
    entries = [{"token_id": t, "logprob": p, "rank": 1, "top_logprobs": []} for t, p in pairs]
    choice = {
        "index": 0,
        "finish_reason": "length" if stop is None else "stop",
        "stop_reason": stop,
        "token_ids": tokens,
        "logprobs": {"content": entries},
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
    }
    usage = {"prompt_tokens": len(body["token_ids"]), "completion_tokens": len(tokens)}
    usage["total_tokens"] = sum(usage.values())
    return {"request_id": "fake", "model": "policy", "usage": usage, "choices": [choice]}


def misshapen(answer: dict[str, Any], fault: str) -> Any:
    """Return the answer with a fault in it."""
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    if fault == "abort":
        choice["finish_reason"] = "abort"
    elif fault == "malformed":
        entries.pop()
    elif fault == "nan":
        entries[0]["logprob"] = -9999.0
    return b"<html>" if fault == "text" else answer


ROUTES: dict[str, tuple[str, Callable[[Handler, Any, Any], Any]]] = {
    "/health": ("GET", Handler.health),
    "/v1/models": ("GET", Handler.models),
    "/get_world_size": ("GET", Handler.world_size),
    "/tokenize": ("POST", Handler.tokenize),
    "/pause": ("POST", Handler.pause),
    "/resume": ("POST", Handler.resume),
    "/is_paused": ("GET", Handler.is_paused),
    "/weight_info": ("GET", Handler.weight_info),
    "/collective_rpc": ("POST", Handler.rpc),
    "/init_weight_transfer_engine": ("POST", Handler.init),
    "/start_weight_update": ("POST", Handler.start),
    "/update_weights": ("POST", Handler.update),
    "/finish_weight_update": ("POST", Handler.finish_update),
    "/reset_prefix_cache": ("POST", Handler.reset_cache),
    GENERATE: ("POST", Handler.generate),
}


@contextmanager
def serving(options: Options, port: int = 0) -> Iterator[Server]:
    """Serve on a thread; a fault `die` closes the port and all connections."""
    server = Server(port, options, leave=lambda: None)
    assert server.engine.model is not None  # made here: it uses torch's global generator
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=0)
    parser.add_argument("--fault", default="")
    parser.add_argument("--once", type=Path)
    found = parser.parse_args()
    port = vars(found).pop("port")
    print("fake server starts", flush=True)
    Server(port, Options(**vars(found)), leave=lambda: os._exit(1)).serve_forever()


if __name__ == "__main__":
    sys.exit(main())
