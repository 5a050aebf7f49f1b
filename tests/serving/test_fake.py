"""The fake server: its answers have the form of the real one's, and its tokens are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from gipo_megatron.serving.client import Client, Request, read_answer
from gipo_megatron.serving.transfer import TRANSFERS
from tests.serving.conftest import CONFIG, hf_model, named
from tests.serving.exchanges import PROMPT, RECORDED, answer, exchanges, sampling, written
from tests.serving.fake import Options, serving

REAL = json.loads((RECORDED / "vllm.json").read_text(encoding="utf-8"))


def differences(fake: Any, real: Any, where: str) -> list[str]:
    """Keys that only the fake has, and values of another type. The fake may leave out keys."""
    if type(fake) is not type(real):
        return [f"{where}: {type(fake).__name__}, not {type(real).__name__}"]
    if isinstance(fake, dict):
        unknown = [f"{where}.{name}: unknown" for name in fake.keys() - real.keys()]
        known = fake.keys() & real.keys()
        return unknown + [d for k in known for d in differences(fake[k], real[k], f"{where}.{k}")]
    if isinstance(fake, list) and fake and real:
        return differences(fake[0], real[0], f"{where}[0]")
    return []


def test_answers_have_the_form_of_recorded_ones(folder: Path, tmp_path: Path) -> None:
    bucket = written(named(hf_model(folder, 1)), tmp_path / "weights")
    found, compared = [], 0
    with (
        serving(Options(folder, max_model_len=64, tokens={"a b": [1, 2]})) as server,
        httpx2.Client() as http,
    ):
        for name, (method, route, body) in exchanges(bucket, CONFIG["vocab_size"]).items():
            fake = answer(http, method, server.url + route, body)
            found += differences(fake, REAL[name], name)
            if fake["status"] != REAL[name]["status"]:
                found.append(f"{name}: HTTP {fake['status']}, not {REAL[name]['status']}")
            compared += 1
    assert compared == len(REAL) > 30
    assert not found


def test_the_client_reads_recorded_answers() -> None:
    names = [name for name in REAL if name.startswith("generate")]
    assert len(names) == 6
    for name in names:
        found = read_answer(REAL[name]["body"], "http://recorded")
        stop = name == "generate stop"
        assert len(found.token_ids) == len(found.logprobs) == (1 if stop else 4)
        assert found.finish == ("stop" if stop else "length")
        assert found.version == ("a1" if name == "generate then" else "default")


@pytest.mark.parametrize("transfer", sorted(TRANSFERS))
def test_greedy_tokens_are_those_of_the_pushed_weights(folder: Path, transfer: str) -> None:
    pushes = TRANSFERS[transfer]()
    with serving(Options(folder)) as server:
        client = Client(server.url, 30)
        for seed in (1, 2):
            model = hf_model(folder, seed)
            pushes.push(client, iter(named(model).items()), f"v{seed}")
            answers: dict[int, Any] = {}
            client.generate([Request(PROMPT, sampling(max_tokens=8, temperature=0.0))], answers)
            want = model.generate(
                torch.tensor([PROMPT]),
                attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
                do_sample=False,
                min_new_tokens=8,
                max_new_tokens=8,
                pad_token_id=0,
                eos_token_id=None,
            )
            response = want[0, len(PROMPT) :]
            with torch.inference_mode():
                logits = model(want).logits[0, len(PROMPT) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            assert list(answers[0].token_ids) == response.tolist()
            assert torch.allclose(torch.tensor(answers[0].logprobs), logprobs, atol=1e-5)
            assert answers[0].version == f"v{seed}"


def test_settings_of_a_draw(folder: Path) -> None:
    """One candidate is greedy; equal seeds give equal tokens, others differ; a penalty changes the
    tokens; the log-prob is of the distribution that was left."""
    asked = {
        "greedy": sampling(max_tokens=12, temperature=0.0),
        "one": sampling(max_tokens=12, top_k=1),
        "small": sampling(max_tokens=12, top_p=1e-6),
        "seed": sampling(max_tokens=12, seed=1),
        "again": sampling(max_tokens=12, seed=1),
        "other": sampling(max_tokens=12, seed=2),
        "penalty": sampling(max_tokens=12, temperature=0.0, repetition_penalty=50.0),
    }
    with serving(Options(folder)) as server:
        client = Client(server.url, 30)
        answers: dict[int, Any] = {}
        client.generate([Request(PROMPT, settings) for settings in asked.values()], answers)
    found = {name: answers[i] for i, name in enumerate(asked)}
    greedy = found["greedy"].token_ids
    assert greedy == found["one"].token_ids == found["small"].token_ids
    assert set(found["one"].logprobs) == set(found["small"].logprobs) == {0.0}
    assert found["seed"] == found["again"] != found["other"]
    assert len(set(found["penalty"].token_ids)) > len(set(greedy))
