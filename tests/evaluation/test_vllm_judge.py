"""The openai judge against `vllm serve` of SmolLM2-135M-Instruct: VLLM_PYTHON is the interpreter of
an environment with vLLM, SMOLLM the folder that tools/fetch_smollm.py writes.

VLLM_PYTHON=… SMOLLM=… pytest -s -m vllm tests/evaluation/test_vllm_judge.py prints the figures of
docs/evaluation.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.chat_refusals import CHANGES
from gipo_megatron.evaluation.judges.openai import OpenAIJudge
from gipo_megatron.evaluation.types import FAILED, FIRST, SECOND, Pair, Verdict
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.specs import Serve

PYTHON, MODEL = os.environ.get("VLLM_PYTHON", ""), os.environ.get("SMOLLM", "")
MISSING = [name for name in ("VLLM_PYTHON", "SMOLLM") if not os.environ.get(name)]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not set"),
]
LENGTH = 2048  # tokens of the server's context
START = 400.0  # seconds
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# max_tokens; the text form has no bound of its own, and small models repeat themselves
MOST = {"text": 320, "json": 1024}

# a question, a good answer, a bad one
DOZEN = [
    ("How do I boil an egg?", "Put it in boiling water for eight minutes, then cool it.", "Eggs."),
    ("What is the capital of France?", "Paris.", "The capital of France is Berlin, I think."),
    (
        "My tyre is flat. What now?",
        "Stop safely, jack the car up, fit the spare wheel.",
        "Drive on.",
    ),
    ("Name three fruits.", "Apples, pears and plums.", "Carrots, leeks and a chair."),
    ("Is the Earth flat?", "No, it is close to a sphere.", "Yes, everyone has seen that."),
    ("How much is 12 times 12?", "144.", "It is a large number, perhaps 100 or 200."),
    ("I cannot sleep. Any advice?", "Keep regular hours and avoid screens in bed.", "Then don't."),
    ("Who wrote Hamlet?", "William Shakespeare.", "Hamlet was written by Hamlet."),
    (
        "How do plants get energy?",
        "From light, by photosynthesis in their leaves.",
        "They eat soil.",
    ),
    ("What does a thermometer measure?", "Temperature.", "It measures the time of day."),
    ("Give me a synonym of happy.", "Glad.", "Unhappy is a synonym of happy, and so is sad."),
    ("How do I thank my teacher?", "Write a short note on what you learnt.", "Teachers need none."),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's base_url."""
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"),
        *("--served-model-name", "judge", "--host", "127.0.0.1", "--port", "{port}"),
        *("--max-model-len", str(LENGTH), "--max-num-seqs", "8", "--enforce-eager"),
    ]
    serve = Serve(command=command, start_timeout=START)
    log = tmp_path_factory.mktemp("vllm") / "log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = ServerProcess(serve, Path(MODEL), log, dtype="auto", max_length=LENGTH)
        address = server.start()
    try:
        yield f"{address}/v1"
    finally:
        server.stop()


def judge_at(url: str, folder: Path, **changed: object) -> OpenAIJudge:
    settings = {"model": "judge", "api_key_env": "", "timeout": 300.0, "max_tokens": 512}
    return OpenAIJudge(base_url=url, directory=folder, **{**settings, **changed})  # type: ignore[arg-type]


def both_orders() -> list[Pair]:
    return [
        Pair("task", "helpful", question, f"Human: {question}", *order)
        for question, good, bad in DOZEN
        for order in ((good, bad), (bad, good))
    ]


def judged(judge: OpenAIJudge, pairs: list[Pair]) -> list[Verdict]:
    verdicts = [v for v in judge.judge(pairs, lambda _: None) if v is not None]
    assert len(verdicts) == len(pairs)
    return verdicts


def figures(form: str, verdicts: list[Verdict]) -> str:
    choices = [v.choice for v in verdicts]
    both = [two for two in zip(choices[::2], choices[1::2], strict=True) if FAILED not in two]
    flipped = sum(a == b and a in (FIRST, SECOND) for a, b in both)
    tokens = sum(v.completion_tokens for v in verdicts)
    return (
        f"{form}: {len(choices) - choices.count(FAILED)} of {len(choices)} answers have a verdict;"
        f" {flipped} of {len(both)} pairs flipped by the order; {tokens} tokens"
    )


def test_every_answer_of_the_schema_has_a_verdict(url: str, tmp_path: Path) -> None:
    for form in ("text", "json"):
        judge = judge_at(url, tmp_path, answer=form, max_tokens=MOST[form])
        start = time.monotonic()
        verdicts = judged(judge, both_orders())
        print(f"\n{figures(form, verdicts)}; {time.monotonic() - start:.0f} s")
        assert len(verdicts) == 24 and judge.about()["changes"] == []
        again = judged(judge, both_orders())
        assert all(v.cached for v in again)
    assert not [v.text for v in verdicts if v.choice == FAILED], "of json, the last one"


def test_a_text_that_is_too_long_fails_alone(url: str, tmp_path: Path) -> None:
    pairs = both_orders()[:1]
    long = Pair("task", "helpful", "long", "What?", "word " * 2 * LENGTH, "Short.")
    verdicts = judged(judge_at(url, tmp_path, answer="json"), [long, *pairs])
    assert verdicts[0].choice == FAILED and "maximum context length" in verdicts[0].text
    assert verdicts[1].choice != FAILED


def test_settings_that_the_server_refuses_end_it(url: str, tmp_path: Path) -> None:
    pairs = both_orders()
    with pytest.raises(UserError, match="cannot be greater than max_model_len"):
        judge_at(url, tmp_path, max_tokens=LENGTH + 1).judge(pairs, lambda _: None)
    with pytest.raises(UserError, match="does not exist") as raised:
        judge_at(url, tmp_path, model="another").judge(pairs, lambda _: None)
    assert "judge.model" in (raised.value.fix or "")
    with pytest.raises(UserError, match="HTTP 404") as raised:
        judge_at(url.removesuffix("/v1"), tmp_path).judge(pairs, lambda _: None)
    assert "/v1" in (raised.value.fix or "")


def test_other_names_of_a_setting(url: str, tmp_path: Path) -> None:
    """The changes after a refusal are accepted: vLLM takes both names, and a user's text alone."""
    judge = judge_at(url, tmp_path, answer="json", max_tokens=64)
    judge.changes.extend(CHANGES)
    (verdict,) = judged(judge, both_orders()[:1])
    assert 0 < verdict.completion_tokens <= 64
