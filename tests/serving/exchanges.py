"""Requests whose answers by a real vLLM server are in recorded/, and the script that records them:
`python -m tests.serving.exchanges URL FOLDER`; FOLDER: of the model that the server runs.

The recorded answers are bounded: long texts and numbers of the day are cut.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

RECORDED = Path(__file__).with_name("recorded")
PROMPT = [5, 6, 7, 8]
LONG = 100_000  # tokens: more than any server of these tests takes
CHARACTERS, ITEMS = 300, 8  # of a recorded text, of a list


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


def exchanges(bucket: dict[str, Any], vocab_size: int) -> dict[str, tuple[str, str, Any]]:
    """Name -> (method, route, body), in an order that a server can follow. `bucket`: all tensors of
    the server's model, as serving/transfer.py sends them."""
    route = "/inference/v1/generate"
    update = {"update_info": bucket}
    every_id = list(range(vocab_size))
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
        "generate greedy": ("POST", route, generate(PROMPT, temperature=0.0)),
        "generate top": ("POST", route, generate(PROMPT, top_k=3, top_p=0.5, temperature=0.5)),
        "generate stop": ("POST", route, generate(PROMPT, stop_token_ids=every_id)),
        "stop id out of vocabulary": ("POST", route, generate(PROMPT, stop_token_ids=[10**7])),
        "generate penalty": ("POST", route, generate(PROMPT, repetition_penalty=1.5)),
        "prompt too long": ("POST", route, generate([5] * LONG)),
        "response too long": ("POST", route, generate(PROMPT, max_tokens=LONG)),
        "id out of vocabulary": ("POST", route, generate([10**7])),
        "negative id": ("POST", route, generate([-1])),
        "no prompt": ("POST", route, generate([])),
        "bad temperature": ("POST", route, generate(PROMPT, temperature=-1.0)),
        "no object": ("POST", route, [1]),
        "is paused": ("GET", "/is_paused", None),
        "bad pause": ("POST", "/pause?mode=never", None),
        "pause": ("POST", "/pause?mode=abort", None),
        "is paused then": ("GET", "/is_paused", None),
        "init transfer": ("POST", "/init_weight_transfer_engine", {"init_info": {}}),
        "reset": ("POST", "/collective_rpc", {"method": "gipo_reset"}),
        "update without start": ("POST", "/update_weights", update),
        "start update": ("POST", "/start_weight_update", None),
        "start update twice": ("POST", "/start_weight_update", None),
        "finish update too early": ("POST", "/finish_weight_update", {"weight_version": "a0"}),
        "reset then": ("POST", "/collective_rpc", {"method": "gipo_reset"}),
        "start update then": ("POST", "/start_weight_update", None),
        "bad update": ("POST", "/update_weights", {"update_info": {"names": 3}}),
        "update after a bad one": ("POST", "/update_weights", update),
        "start update again": ("POST", "/start_weight_update", None),
        "update": ("POST", "/update_weights", update),
        "finish update": ("POST", "/finish_weight_update", {"weight_version": "a1"}),
        "reset prefix cache": ("POST", "/reset_prefix_cache", None),
        "resume": ("POST", "/resume", None),
        "weight info then": ("GET", "/weight_info", None),
        "generate then": ("POST", route, generate(PROMPT, temperature=0.0)),
    }


def written(tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write the tensors, which have one dtype, into a file; return the bucket of it."""
    import torch

    path.write_bytes(
        b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    )
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    assert len(dtypes) == 1
    shapes = [list(t.shape) for t in tensors.values()]
    return {"names": list(tensors), "shapes": shapes, "dtype": dtypes.pop(), "path": str(path)}


def answer(http: httpx2.Client, method: str, route: str, body: Any) -> dict[str, Any]:
    """{"status", "body"} of a request; the body null where it is empty."""
    # the server closes a connection after an error
    response = http.request(method, route, json=body, headers={"Connection": "close"})
    try:
        found = response.json() if response.content else None
    except ValueError:
        found = response.text
    return {"status": response.status_code, "body": found}


def cut(value: Any) -> Any:
    """Return what is kept of an answer: no long text or list, and no path of the machine."""
    if isinstance(value, dict):
        return {name: cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [cut(item) for item in value[:ITEMS]]
    if isinstance(value, str):
        return "PATH" if value.startswith("/") else value[:CHARACTERS]
    return value


def record(url: str, folder: Path) -> None:
    """Write what the server at `url` answers, one file."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocab_size = config["vocab_size"]
    tensors = load_file(folder / "model.safetensors")
    found = {}
    with tempfile.TemporaryDirectory() as scratch, httpx2.Client(timeout=300) as http:
        bucket = written(tensors, Path(scratch) / "weights")
        for name, (method, route, body) in exchanges(bucket, vocab_size).items():
            found[name] = cut(answer(http, method, url + route, body))
            print(name, str(found[name])[:200], flush=True)
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / "vllm.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
