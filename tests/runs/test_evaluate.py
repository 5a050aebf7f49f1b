"""launch/evaluate.py on tiny policies: what is drawn and measured, under every split, and after a
kill; what a user gets wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gipo_megatron import cli
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.training.run_lock import RunLock
from tests.runs import chain

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
POLICIES = ("gipo", "sft", "other")  # other: a Hugging Face folder with weights of its own
PROMPTS = 11  # odd, and no multiple of a batch
RESPONSE = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    texts = [
        f"Say {'very ' * (i % 4)}number {i}.{' <script>alert(1)</script>' if i == 3 else ''}"
        for i in range(PROMPTS)
    ]
    (folder / "short.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    )
    (folder / "posts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{text} TL;DR:"}) + "\n" for text in texts[:3])
    )
    return folder


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """The SFT model with another output layer: three steps of training leave all policies saying
    the same."""
    folder = Path(shutil.copytree(base / "sft" / "hf", base / "other" / "final"))
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0))
    save_file(
        {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 0.1 * noise},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def evaluate(directory: Path, base: Path, data: Path, *more: str) -> list[str]:
    tasks = (
        "[{name: short, kind: helpful, data: short.jsonl, template: hh, prompts: 99, max_length:"
        " 96}, {name: posts, kind: summary, data: posts.jsonl, template: plain, prompts: 99,"
        " max_length: 96}]"
    )
    file = data / "small_evaluate.yaml"
    file.write_text(
        "defaults: [base/evaluate, hardware/cpu]\nmodel: {tokenizer: bytes}\npolicies:"
        f" {{{', '.join(f'{name}: {{load: {base}/{name}/final}}' for name in POLICIES)}}}\nmodels:"
        f" {{reward: {{load: {base}/rm/final}}, reference: {{load: {base}/sft/final}}, critic:"
        f" {{load: {base}/gipo/final}}}}\ntasks: {tasks}\ndata_root: {data}\ngeneration:"
        f" {{max_response: {RESPONSE}, temperature: 0, batch: 4}}\njudge: reward_model\nreport:"
        " {bootstrap: 50}\n"
    )
    return [f"recipe={file}", f"run.dir={directory}", *more]


def lines(file: Path) -> list[dict[str, Any]]:
    """Rows; without the head line that a store begins with."""
    return [
        row for line in file.read_text().splitlines() if set(row := json.loads(line)) != {"key"}
    ]


def responses(directory: Path, policy: str) -> dict[str, dict[str, Any]]:
    rows = lines(directory / "responses" / f"{policy}.jsonl")
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    return {row["prompt_id"]: row for row in rows}


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.jsonl"))
    }


def kill_after_a_batch(arguments: list[str], directory: Path) -> dict[str, bytes]:
    """launch/evaluate.py, killed in the midst of its second policy; what it had written, with a
    torn last line."""
    command = [*chain.python(1), "launch/evaluate.py", *arguments]
    file = directory / "responses" / "sft.jsonl"
    with chain.session(command, chain.environment()) as process:
        chain.wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") >= 2, process)
    assert not (directory / "results.json").exists()
    before = tree(directory)
    with file.open("ab") as torn:
        torn.write(b'{"policy": "sft", "task": "sho')
    return before


@pytest.fixture(scope="module")
def done(base: Path, data: Path, other: Path) -> tuple[Path, dict[str, bytes], list[chain.Outcome]]:
    """One start on two processes; what the killed evaluation had written before it; what the last
    two cases of it printed."""
    sampled = ["generation.temperature=1", "generation.top_p=1"]
    killed = kill_after_a_batch(
        evaluate(base / "e_killed", base, data, "generation.batch=1"), base / "e_killed"
    )
    cases = [
        evaluate(base / "e_dp2", base, data),
        evaluate(base / "e_tp2", base, data, "parallel.tensor=2"),
        evaluate(base / "e_pp2", base, data, "parallel.pipeline=2", "generation.batch=64"),
        evaluate(base / "e_sampled", base, data, *sampled),
        evaluate(
            base / "e_sampled_tp2",
            base,
            data,
            *sampled,
            "parallel.tensor=2",
            "generation.batch=5",
            "batch.micro_batch=2",
        ),
        evaluate(base / "e_killed", base, data),
        evaluate(base / "e_human", base, data, "judge=human", "judge.pairs=2"),
        evaluate(base / "e_dp2", base, data),
    ]
    return base, killed, chain.outcomes(cases, base, processes=2)[-2:]


def test_a_full_run(done: tuple[Path, Any, Any]) -> None:
    folder = done[0] / "e_dp2"
    prompts = lines(folder / "prompts.jsonl")
    assert len(prompts) == PROMPTS + 3
    for policy in POLICIES:
        found = responses(folder, policy)
        assert set(found) == {prompt["prompt_id"] for prompt in prompts}
        assert all(
            set(row["figures"]) == {"score", "kl", "p_high"} and 0 <= row["figures"]["p_high"] <= 1
            for row in found.values()
        )
    results = json.loads((folder / "results.json").read_text())
    assert results["subject"] == "gipo" and set(results) == {
        "short",
        "posts",
        "subject",
        "judge",
        "bootstrap",
        "incomplete",
        "warnings",
        "policies",
    }
    (warning,) = results["warnings"]
    assert warning.startswith("gipo was trained against the reward model that judges")
    assert f"Warning: {warning}" in (folder / "report.html").read_text()
    for task, count in (("short", PROMPTS), ("posts", 3)):
        assert set(results[task]) == {"sft", "other"}
        for cell in results[task].values():
            assert (
                cell["win"] + cell["tie"] + cell["lose"] == cell["n"] == count
                and cell["failed"] == cell["flipped"] == 0
            )
    assert len(lines(folder / "verdicts.jsonl")) == 2 * 2 * (PROMPTS + 3)
    names = {path.name for path in folder.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "table.md",
        "table.tex",
        "report.html",
        "audit.html",
    } <= names
    assert len(list((folder / "figures").glob("*.svg"))) >= 2
    assert "<script>alert" not in (folder / "report.html").read_text()


@torch.no_grad()
def test_greedy_responses_scores_and_kl_are_those_of_transformers(
    done: tuple[Path, Any, Any],
) -> None:
    base, folder, tokenizer = done[0], done[0] / "e_dp2", byte_tokenizer()
    gipo, sft = (
        AutoModelForCausalLM.from_pretrained(base / name / "hf", dtype=torch.float32)
        for name in ("gipo", "sft")
    )
    reward = AutoModelForSequenceClassification.from_pretrained(
        base / "rm" / "hf", dtype=torch.float32
    )
    compared, found = 0, responses(folder, "gipo")
    for prompt in lines(folder / "prompts.jsonl"):
        ids, row = [tokenizer.bos_id, *tokenizer.encode(prompt["text"])], found[prompt["prompt_id"]]
        start = len(ids)
        for _ in range(RESPONSE):
            ids.append(int(gipo(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_id:
                break
        ended = ids[-1] == tokenizer.eos_id
        assert (row["text"], row["tokens"], row["finished"]) == (
            tokenizer.decode(ids[start:]),
            len(ids) - start,
            ended,
        )
        tokens = torch.tensor([ids])
        logprobs = [
            model(tokens)
            .logits.log_softmax(-1)[0, start - 1 : -1]
            .gather(1, tokens[0, start:, None])
            .sum()
            for model in (gipo, sft)
        ]
        assert row["figures"]["kl"] == pytest.approx(float(logprobs[0] - logprobs[1]), abs=1e-4)
        assert row["figures"]["score"] == pytest.approx(
            float(reward(tokens).logits[0, 0]), abs=1e-4
        )
        compared += 1
    assert compared == PROMPTS + 3
    assert all(row["figures"]["kl"] == 0 for row in responses(folder, "sft").values())
    assert responses(folder, "other") != found


def test_every_split_draws_the_same(done: tuple[Path, Any, Any]) -> None:
    base, compared = done[0], 0
    for one, others in (
        ("e_dp2", ("e_tp2", "e_pp2", "e_killed")),
        ("e_sampled", ("e_sampled_tp2",)),
    ):
        for other in others:
            for policy in POLICIES:
                a, b = responses(base / one, policy), responses(base / other, policy)
                assert {k: (row["text"], row["tokens"]) for k, row in a.items()} == {
                    k: (row["text"], row["tokens"]) for k, row in b.items()
                }
                assert all(
                    row["figures"] == pytest.approx(b[k]["figures"], abs=1e-4)
                    for k, row in a.items()
                )
                compared += 1
    assert compared == 12
    greedy, sampled = responses(base / "e_dp2", "sft"), responses(base / "e_sampled", "sft")
    assert any(greedy[k]["text"] != sampled[k]["text"] for k in greedy)


def test_a_killed_evaluation_repeats_nothing(done: tuple[Path, dict[str, bytes], Any]) -> None:
    base, before, _ = done
    after = tree(base / "e_killed")
    assert {"responses/gipo.jsonl", "responses/sft.jsonl"} <= set(before)
    assert all(after[name].startswith(content) for name, content in before.items())
    assert after["responses/gipo.jsonl"] == before["responses/gipo.jsonl"]
    assert (
        1
        < before["responses/sft.jsonl"].count(b"\n")
        < after["responses/sft.jsonl"].count(b"\n")
        == 1 + PROMPTS + 3
    )
    results = [
        json.loads((base / name / "results.json").read_text()) for name in ("e_killed", "e_dp2")
    ]
    assert all(results[0][task] == results[1][task] for task in ("short", "posts"))


def test_the_same_command_again_draws_and_asks_nothing(
    done: tuple[Path, Any, list[chain.Outcome]],
) -> None:
    base, _, (_, again) = done
    assert (
        again.error == ""
        and "complete" in again.printed
        and "responses:" not in again.printed
        and "verdicts:" not in again.printed
    )
    assert all(
        len(lines(base / "e_dp2" / "responses" / f"{policy}.jsonl")) == PROMPTS + 3
        for policy in POLICIES
    )
    assert len(lines(base / "e_dp2" / "verdicts.jsonl")) == 2 * 2 * (PROMPTS + 3)


def test_people_get_pages(done: tuple[Path, Any, list[chain.Outcome]]) -> None:
    base, _, (human, _) = done
    assert human.error == "" and "judge.ratings=" in human.printed
    assert (
        len(list((base / "e_human" / "annotation").glob("*.html"))) == 3
        and not (base / "e_human" / "results.json").exists()
    )


# --------------------------------------------------------------------------- what a user gets wrong

Refuse = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Start with these arguments; returns the message of exit code 2."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def start(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as left:
            cli.main(["evaluate", *arguments])
        err = capsys.readouterr().err
        assert left.value.code == 2 and "Traceback" not in err and len(err.splitlines()) <= 25
        return err

    return start


def test_an_unknown_policy(refused: Refuse, base: Path, data: Path, tmp_path: Path) -> None:
    error = refused(evaluate(tmp_path / "run", base, data, "opponents=[sfft]"))
    assert "opponents: there is no policy 'sfft'" in error and "did you mean 'sft'?" in error
    error = refused(
        evaluate(tmp_path / "run", base, data, f"policies.sft.load={base}/nowhere/final")
    )
    assert (
        "policies.sft.load" in error
        and "not on this machine" in error
        and not (tmp_path / "run").exists()
    )


def test_a_folder_that_another_run_has(
    refused: Refuse, base: Path, other: Path, data: Path, tmp_path: Path
) -> None:
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        error = refused(evaluate(tmp_path / "run", base, data))
        assert f"in use by another run: process {os.getpid()}" in error and "run.dir" in error
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_weights_that_cannot_be_read(
    refused: Refuse, base: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree((base / "sft" / "final").resolve(), tmp_path / "copy")
    os.truncate(copy / "actor" / "__0_0.distcp", 100)
    assert "damaged checkpoint: actor/__0_0.distcp has 100 bytes" in refused(
        evaluate(tmp_path / "run", base, data, f"policies.sft.load={copy}")
    )
    error = refused(evaluate(tmp_path / "run", base, data, f"models.critic.load={base}/rm/final"))
    assert "has no critic with a group head" in error and "models.critic.load" in error


def test_two_policies_with_different_tokenizers(
    refused: Refuse, base: Path, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree((base / "sft" / "final").resolve(), tmp_path / "copy"))
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "tokenizer": "of other text"}))
    error = refused(evaluate(tmp_path / "run", base, data, f"policies.sft.load={copy}"))
    assert (
        "two policies with different tokenizers: gipo" in error
        and f"sft ({copy})" in error
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "nothing at"), (b'{"prompt": \n', "unreadable JSON"), (b"", "no rows")],
)
def test_unreadable_prompts(
    refused: Refuse, base: Path, tmp_path: Path, data: Path, content: bytes | None, said: str
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "data"))
    (own / "short.jsonl").unlink()
    if content is not None:
        (own / "short.jsonl").write_bytes(content)
    error = refused(evaluate(tmp_path / "run", base, own))
    assert said in error and "short.jsonl" in error and not (tmp_path / "run").exists()


def test_responses_that_were_drawn_otherwise(
    refused: Refuse, done: tuple[Path, Any, Any], data: Path
) -> None:
    base = done[0]
    before = tree(base / "e_dp2")
    error = refused(evaluate(base / "e_dp2", base, data, "generation.temperature=0.5"))
    assert "generation.temperature: 0.0 there, 0.5 now" in error and "run.dir" in error
    error = refused(
        evaluate(base / "e_dp2", base, data, f"policies.sft.load={base}/gipo_long/final")
    )
    assert "policies.sft.load" in error and "gipo_long" in error
    assert "verdicts.jsonl was made by other" in refused(
        evaluate(base / "e_dp2", base, data, "judge.tie_margin=0.1")
    )
    arguments = evaluate(base / "e_dp2", base, data)
    other_subject = data / "swapped_evaluate.yaml"
    text = (data / "small_evaluate.yaml").read_text()
    sft = f"sft: {{load: {base}/sft/final}}, "
    other_subject.write_text(text.replace(sft, "").replace("policies: {", f"policies: {{{sft}"))
    assert "verdicts.jsonl was made by other" in refused(
        [f"recipe={other_subject}", *arguments[1:]]
    )
    assert tree(base / "e_dp2") == before
