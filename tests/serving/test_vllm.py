"""Weights pushed into a real vLLM server on CPU, in fp32: SmolLM2-135M, greedy tokens compared with
transformers'.

    VLLM_PYTHON=…/bin/python SMOLLM=FOLDER pytest -m vllm -s tests/serving/test_vllm.py

FOLDER: of `python tools/fetch_smollm.py FOLDER`. One server serves all tests; every test pushes
the weights that it needs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from gipo_megatron.serving.client import Answer, Client, Request, ServerLost
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.serving.transfer import TRANSFERS
from gipo_megatron.specs import Serve
from tests import forked
from tests.data.fixtures import SHARED

PYTHON = os.environ.get("VLLM_PYTHON", "")
SMOLLM = Path(os.environ.get("SMOLLM", "runs/smollm2"))
ROWS, TOKENS, LONGEST = 16, 16, 160
BLOCK = 128  # tokens of vLLM's cache on CPU: a prompt's whole blocks are kept
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="needs VLLM_PYTHON, an interpreter with vLLM"),
    pytest.mark.skipif(
        not (SMOLLM / "config.json").is_file(),
        reason="needs SmolLM2: python tools/fetch_smollm.py FOLDER, and SMOLLM=FOLDER",
    ),
]


@dataclass(frozen=True)
class Policy:
    """A folder of weights in fp32, and transformers' greedy responses: tokens and log-probs
    [ROWS, TOKENS]."""

    folder: Path
    state: dict[str, Tensor]
    tokens: Tensor
    logprobs: Tensor


@cache
def prompts() -> list[list[int]]:
    """Dialogues of HH where there are some, of many lengths."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    file = SHARED / "hh-rlhf" / "helpful-base" / "train.jsonl.gz"
    if file.is_file():
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[0] for line in lines]
    else:
        sentence = "Tell me how a small boat crosses the wide river at night when it rains "
        texts = [f"\n\nHuman: {(sentence * 9)[: 6 * i + 9]}?" for i in range(99)]
    found: dict[int, list[int]] = {}
    for text in texts[:300]:
        ids = tokenizer(f"{text}\n\nAssistant:", add_special_tokens=False)["input_ids"]
        if len(ids) <= LONGEST:
            found.setdefault(len(ids), ids)
    lengths = sorted(found)
    chosen = [lengths[i * (len(lengths) - 1) // (ROWS - 1)] for i in range(ROWS)]
    assert len(set(chosen)) == ROWS and chosen[-1] > BLOCK
    return [found[length] for length in chosen]


def greedy(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    lengths = [len(p) for p in prompts()]
    width = max(lengths)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts()]),
            attention_mask=(torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long(),
            do_sample=False,
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[:, width:]
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1)
    return tokens, logprobs.gather(2, tokens[..., None])[..., 0]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """The published weights, and others with 5% of noise in every matrix."""
    found = {}
    for name in ("published", "changed"):
        model = LlamaForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
        if name == "changed":
            g = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.05 * torch.randn(p.shape, generator=g))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
        found[name] = Policy(folder, state, *greedy(model))
    assert not torch.equal(found["published"].tokens, found["changed"].tokens)
    return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("HF_HUB_OFFLINE", "1")):
            patch.setenv(name, value)
        serve = Serve(args=["--max-num-seqs", "32"], start_timeout=1200)  # compiled, as in a run
        log = tmp_path_factory.mktemp("server") / "server.log"
        process = ServerProcess(serve, SMOLLM.resolve(), log, "float32", 1024)
        start = time.monotonic()
        client = Client(process.start(), timeout=300)
        print(f"\nserver ready after {time.monotonic() - start:.0f} s")
    try:
        yield client
    finally:
        process.stop()


def answers(client: Client) -> list[Answer]:
    """Greedy responses to the prompts, all requested at once."""
    sampling = {
        "temperature": 0.0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    found: dict[int, Answer] = {}
    client.generate([Request(prompt, sampling) for prompt in prompts()], found)
    return [found[i] for i in range(ROWS)]


def check(client: Client, policy: Policy, version: str, title: str) -> None:
    """Check that the server has a policy's weights."""
    found = answers(client)
    assert [list(answer.token_ids) for answer in found] == policy.tokens.tolist()
    assert {answer.version for answer in found} == {version}
    different = (torch.tensor([a.logprobs for a in found]) - policy.logprobs).abs()
    print(
        f"{title}: {different.numel()} tokens, log-prob differences from transformers: mean"
        f" {different.mean():.1e}, max {different.max():.1e}"
    )
    assert different.max() < 1e-3


def received(client: Client) -> Mapping[str, str]:
    (sums,) = client.post("/collective_rpc", {"method": "gipo_checksums"})["results"]
    return sums


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in state.items()
    }


def cached_tokens(client: Client) -> float:
    """Prompt tokens that the server took from its prefix cache until now."""
    text = httpx2.get(f"{client.url}/metrics", trust_env=False).text
    (hits,) = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)
    return float(hits)


def test_a_server_of_random_weights_answers_as_the_pushed_ones(
    client: Client, policies: dict[str, Policy]
) -> None:
    """By both transports, one after the other on one server: before and after weights change."""
    senders = {name: kind(checksums=True) for name, kind in TRANSFERS.items()}
    rounds = [
        ("file", "published"),
        ("broadcast", "changed"),
        ("broadcast", "published"),
        ("file", "changed"),
    ]
    for i, (transfer, name) in enumerate(rounds):
        state, version = policies[name].state, f"push-{i}"
        start, hits = time.monotonic(), cached_tokens(client)
        senders[transfer].push(client, iter(state.items()), version)
        title = f"{name} by {transfer}, pushed in {time.monotonic() - start:.1f} s"
        assert received(client) == digests(state)
        check(client, policies[name], version, title)
        assert cached_tokens(client) == hits  # none of earlier weights
    answers(client)
    assert cached_tokens(client) > hits  # the same prompts again: the cache is in use


@pytest.mark.parametrize(
    ("transfer", "tensor", "pipeline"), [("file", 1, 2), ("broadcast", 3, 1)], ids=["PP 2", "TP 3"]
)  # 9 attention heads and 3 of keys and values: no TP 2
def test_ranks_push_the_whole_model(
    client: Client,
    policies: dict[str, Policy],
    tmp_path: Path,
    transfer: str,
    tensor: int,
    pipeline: int,
) -> None:
    TRANSFERS["file"]().push(client, iter(policies["published"].state.items()), "before")
    out, version = tmp_path / "sums.json", f"{tensor}-{pipeline}"
    worker = Path(__file__).with_name("push_worker.py")
    folder = str(policies["changed"].folder)
    words = [client.url, folder, transfer, str(tensor), str(pipeline), version, str(out)]
    done = forked.run(worker, *words, ranks=tensor * pipeline)
    assert done.code == 0, done.stderr[-3000:]
    sums = json.loads(out.read_text())
    assert received(client) == sums == digests(policies["changed"].state)
    check(client, policies["changed"], version, f"TP {tensor}, PP {pipeline}")


def test_a_push_that_is_no_whole_model_fails_and_the_next_one_repairs_it(
    client: Client, policies: dict[str, Policy]
) -> None:
    policy = policies["published"]
    whole = policy.state
    last = "model.layers.29.mlp.down_proj.weight"
    broken: dict[str, tuple[dict[str, Any], str]] = {
        "without one of three parts of a layer": (
            {k: v for k, v in whole.items() if k != "model.layers.3.self_attn.v_proj.weight"},
            r"without weights: model\.layers\.3\.self_attn\.qkv_proj",
        ),
        "without the last layer's": (
            {k: v for k, v in whole.items() if k != last},
            r"without weights: model\.layers\.29\.mlp\.down_proj",
        ),
        "without the embedding": (
            {k: v for k, v in whole.items() if k != "model.embed_tokens.weight"},
            r"without weights: model\.embed_tokens",
        ),
        "a layer more": ({**whole, "model.layers.30.mlp.down_proj.weight": whole[last]}, "30"),
        "an untied output": (
            {**whole, "lm_head.weight": whole["model.embed_tokens.weight"] * 2},
            "ties its own",
        ),
        "another shape": ({**whole, last: whole[last][:, :9]}, "HTTP 500"),
    }
    for i, (state, message) in enumerate(broken.values()):
        sender = TRANSFERS[("file", "broadcast")[i % 2]]()
        with pytest.raises(ServerLost, match=message):
            sender.push(client, iter(state.items()), f"broken-{i}")
        assert client.get("/is_paused") == {"is_paused": True}
    for name in TRANSFERS:
        TRANSFERS[name]().push(client, iter(whole.items()), f"whole by {name}")
        check(client, policy, f"whole by {name}", f"repaired by {name}")
