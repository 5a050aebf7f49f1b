"""Requests whose answers by a real vLLM server are in recorded/, and the script that records them:
`python -m tests.serving.exchanges URL FOLDER`; FOLDER: of the model that the server runs.

The recorded answers are bounded: long texts and numbers of the day are cut.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

RECORDED = Path(__file__).with_name("recorded")
PROMPT = [5, 6, 7, 8]
LONG = 100_000  # tokens: more than any server of these tests takes
CHARACTERS = 300  # of a recorded text


def sampling(**more: Any) -> dict[str, Any]:
    """The settings of a response as the rollouts send them."""
    return {
        "max_tokens": 4,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": 2**63 - 1,
        "ignore_eos": True,
        "stop_token_ids": [],
        "logprobs": 0,
        "detokenize": False,
        **more,
    }


def generate(token_ids: list[int], **more: Any) -> dict[str, Any]:
    return {"token_ids": token_ids, "sampling_params": sampling(**more)}


def exchanges(update: str) -> dict[str, tuple[str, str, Any]]:
    """Name -> (method, route, body), in an order that a server can follow. `update`: a safetensors
    file of some of the model's tensors."""
    route = "/inference/v1/generate"
    return {
        "health": ("GET", "/health", None),
        "models": ("GET", "/v1/models", None),
        "no route": ("GET", "/no_such_route", None),
        "route with another method": ("GET", route, None),
        "control route with another method": ("GET", "/pause", None),
        "tokenize": ("POST", "/tokenize", {"prompt": "a b", "add_special_tokens": False}),
        "world size": ("GET", "/get_world_size", None),
        "describe": ("POST", "/collective_rpc", {"method": "gipo_describe"}),
        "unknown method": ("POST", "/collective_rpc", {"method": "gipo_nothing"}),
        "weight info": ("GET", "/weight_info", None),
        "generate": ("POST", route, generate(PROMPT)),
        "generate greedy": ("POST", route, generate(PROMPT, temperature=0.0, seed=None)),
        "generate top": ("POST", route, generate(PROMPT, top_k=3, top_p=0.5, temperature=0.5)),
        "generate stop": ("POST", route, generate(PROMPT, stop_token_ids=list(range(2000)))),
        "generate penalty": ("POST", route, generate(PROMPT, repetition_penalty=1.5)),
        "prompt too long": ("POST", route, generate([5] * LONG)),
        "response too long": ("POST", route, generate(PROMPT, max_tokens=LONG)),
        "id out of vocabulary": ("POST", route, generate([10**7])),
        "negative id": ("POST", route, generate([-1])),
        "no prompt": ("POST", route, generate([])),
        "bad temperature": ("POST", route, generate(PROMPT, temperature=-1.0)),
        "no json object": ("POST", route, [1]),
        "is paused": ("GET", "/is_paused", None),
        "pause": ("POST", "/pause?mode=wait&clear_cache=true", None),
        "is paused then": ("GET", "/is_paused", None),
        "bad pause": ("POST", "/pause?mode=never", None),
        "init transfer": ("POST", "/init_weight_transfer_engine", {"init_info": {}}),
        "start update": ("POST", "/start_weight_update", None),
        "update": ("POST", "/update_weights", {"update_info": {"path": update}}),
        "bad update": ("POST", "/update_weights", {"update_info": {"file": 3}}),
        "finish update": ("POST", "/finish_weight_update", {"weight_version": "a1"}),
        "reset prefix cache": ("POST", "/reset_prefix_cache", None),
        "resume": ("POST", "/resume", None),
        "weight info then": ("GET", "/weight_info", None),
        "generate then": ("POST", route, generate(PROMPT)),
    }


def answer(http: httpx.Client, method: str, route: str, body: Any) -> dict[str, Any]:
    """{"status", "body"} of a request; the body null where it is empty."""
    response = http.request(method, route, json=body)
    try:
        found = response.json() if response.content else None
    except ValueError:
        found = response.text
    return {"status": response.status_code, "body": found}


def cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [cut(item) for item in value]
    return value[:CHARACTERS] if isinstance(value, str) else value


def record(url: str, folder: Path) -> None:
    """Write what the server at `url` answers, one file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    found = {}
    with tempfile.TemporaryDirectory() as scratch, httpx.Client(timeout=300) as http:
        path = f"{scratch}/update.safetensors"
        save_file(tensors, path)
        for name, (method, route, body) in exchanges(path).items():
            found[name] = cut(answer(http, method, url + route, body))
            print(name, found[name])
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / "vllm.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
