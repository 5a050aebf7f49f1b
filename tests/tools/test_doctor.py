from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gipo_megatron.capabilities import Apex, Capabilities, GpuInfo, probe
from gipo_megatron.commands import doctor
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.recipe.compose import compose, load_components
from gipo_megatron.recipe.source import Block
from gipo_megatron.training.rollout_server import SAMPLE, trained_policy
from tests import broken_transformer_engine, forked
from tests.forked import ROOT
from tests.recipe.helpers import small
from tests.serving import fake

# here, since a package that the components import may draw from a global generator
load_components(Block({}, "tests"))
TOOL = ROOT / "tools" / "doctor.py"
H100 = GpuInfo("NVIDIA H100 80GB HBM3", (9, 0), 79.2)
NODE = Capabilities(
    "3.12.3",
    "2.11.0+cu130",
    cuda="13.0",
    nccl="2.28.9",
    gpus=(H100,) * 8,
    megatron="0.16.1",
    transformer_engine="2.11.0",
    wandb="0.19",
)
LAPTOP = Capabilities("3.11.9", "2.13.0+cpu", megatron="0.16.1")
TINY = ["recipe=tiny/sft"]
BIG = ["recipe=hh_sft", "models.actor.load=random"]


@pytest.mark.parametrize(
    ("words", "change", "expected"),
    [
        (BIG, {}, []),
        ([*BIG, "with=hardware/h100x8_fp8"], {}, []),
        ([*BIG, "with=hardware/h100x8_fp8", "world=64", "batch.minibatch=128"], {}, []),
        (BIG, {"gpus": (H100,) * 4}, ["it is for 8 GPUs, 8 a machine; here are 4"]),
        (
            BIG,
            {"gpus": (replace(H100, memory_gib=39.4),) * 8},
            ["it is for GPUs of 80 GiB; the smallest here has 39"],
        ),
        (
            BIG,
            {"gpus": (replace(H100, name="V100", compute=(7, 0)),) * 8},
            ["precision.dtype bf16 needs compute capability 8.0"],
        ),
        (BIG, {"nccl": None}, ["torch has no NCCL"]),
        (BIG, {"megatron": None}, ["megatron-core is not installed"]),
        (
            [*BIG, "with=hardware/h100x8_fp8"],
            {"transformer_engine": None},
            ["precision.fp8 is 'tensorwise', but Transformer Engine is not"],
        ),
        ([*BIG, "run.loggers=[wandb]"], {"wandb": None}, ["run.loggers names wandb"]),
        (
            ["recipe=hh_sft", "models.actor.load=runs/nowhere/final"],
            {},
            ["models.actor.load: 'runs/nowhere/final' is not on this machine"],
        ),
        (TINY, {}, []),
    ],
)
def test_what_keeps_a_recipe_from_running(
    words: list[str], change: dict, expected: list[str]
) -> None:
    found = doctor.obstacles(compose(words, doctor.RECIPES), replace(NODE, **change))
    assert len(found) == len(expected)
    assert all(reason.startswith(start) for reason, start in zip(found, expected, strict=True)), (
        found
    )


def test_a_machine_without_gpus_runs_what_is_for_cpus() -> None:
    assert doctor.obstacles(compose(TINY, doctor.RECIPES), LAPTOP) == []
    both = doctor.obstacles(compose([*BIG, "with=hardware/h100x8_fp8"], doctor.RECIPES), LAPTOP)
    assert len(both) == 2 and "here are 0" in both[0] and "no CUDA device" in both[1]


def test_missing_parts_are_told_with_their_cost() -> None:
    complete, bare = (
        {part: (found, costs) for part, found, costs in doctor.rows(here)}
        for here in (NODE, LAPTOP)
    )
    assert complete["GPU"] == ("8 × NVIDIA H100 80GB HBM3 (9.0, 79 GiB)", "")
    assert complete["FP8 blockwise"] == ("can run", "") and bare["FP8 blockwise"] == (
        "-",
        "no CUDA device",
    )
    missing = {part for part, (found, costs) in bare.items() if found == "-" and costs}
    assert missing == {
        *(
            "CUDA (torch's)",
            "GPU",
            "NCCL",
            "transformer-engine",
            "apex (NVIDIA's)",
            "wandb",
            "vllm (VLLM_PYTHON's)",
        ),
        *("FP8 delayed", "FP8 tensorwise", "FP8 blockwise"),
    }
    assert bare["megatron-core"] == ("0.16.1", "")


def test_the_other_apex_is_named() -> None:
    for nvidia in (True, False):
        rows = {
            part: (found, costs)
            for part, found, costs in doctor.rows(replace(NODE, apex=Apex("0.9.10.dev0", nvidia)))
        }
        assert rows["apex (NVIDIA's)"] == (
            "0.9.10.dev0",
            "" if nvidia else "an unrelated package of that name, not used: pip uninstall apex",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_exit_codes(tmp_path: Path) -> None:
    done = forked.run(TOOL, *BIG, folder=tmp_path)
    assert (
        done.code == 2
        and "hh_sft: cannot run here\n  - it is for 8 GPUs, 8 a machine; here are 0\n"
        in done.stdout
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) < 24
    done = forked.run(TOOL, "recipe=tiny/sft", "run.sed=1", folder=tmp_path)
    assert (
        done.code == 2 and "did you mean 'seed'?" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("kind", ["ASSERTION", "MODULE"])
def test_a_broken_transformer_engine_is_told_in_the_words_of_a_run(
    tmp_path: Path, kind: str
) -> None:
    """Without a GPU a package that it lacks costs nothing; any other error keeps Megatron-Core from
    being imported."""
    environment = broken_transformer_engine.install(
        tmp_path, getattr(broken_transformer_engine, kind)
    )
    command = [sys.executable, str(TOOL), *TINY]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )
    stops = kind == "ASSERTION"
    reason = (
        "AssertionError: Could not find"
        if stops
        else "ModuleNotFoundError: No module named 'pydantic', framework pytorch"
    )
    told = f"Transformer Engine is installed, but does not import: {reason}"
    assert (
        done.stdout.count(told) == (2 if stops else 1)
        and "fix:   pip install 'gipo-megatron[gpu]'" in done.stdout
    )
    assert done.returncode == (2 if stops else 0)
    assert (
        f"tiny/sft: cannot run here\n  - {told}" if stops else "tiny/sft: can run here\n"
    ) in done.stdout


def interpreter(folder: Path, version: str) -> str:
    """Return a program in the place of a Python whose environment has that version of vLLM."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    return str(program)


def server_reasons(folder: Path, *words: str) -> list[str]:
    return doctor.obstacles(small(folder, "algorithm.rollout.name=vllm", *words), LAPTOP)


def test_the_program_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = "algorithm.rollout.serve"
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    (reason,) = server_reasons(tmp_path)
    assert (
        ".serve.python: no Python with vLLM is given; " in reason
        and "export VLLM_PYTHON=" in reason
    )
    monkeypatch.setenv("VLLM_PYTHON", interpreter(tmp_path, "0.32.0"))
    assert server_reasons(tmp_path) == [] and probe().vllm == "0.32.0"
    monkeypatch.setenv("VLLM_PYTHON", str(tmp_path / "nowhere"))
    assert probe().vllm is None
    (reason,) = server_reasons(tmp_path)
    assert f": no program '{tmp_path}/nowhere'" in reason
    (reason,) = server_reasons(tmp_path, f"{serve}.python={interpreter(tmp_path, '')}")
    assert f": {tmp_path}/python has no vLLM" in reason
    assert server_reasons(tmp_path, f"{serve}.command=[sh, serve]") == []
    (reason,) = server_reasons(tmp_path, f"{serve}.command=[no-such-program]")
    assert ": no program 'no-such-program'" in reason


def test_the_server_at_a_url(tmp_path: Path) -> None:
    """Compared with the actor: length, routes, model, tokenizer."""
    policy = trained_policy(small(tmp_path), byte_tokenizer())
    policy.write(tmp_path / "model")
    options = fake.Options(tmp_path / "model", tokens={SAMPLE: policy.tokenizer.encode(SAMPLE)})
    with fake.serving(options) as server:
        url = f"algorithm.rollout.url=http://127.0.0.1:{server.server_port}"
        assert server_reasons(tmp_path, url) == []
        (reason,) = server_reasons(tmp_path, url, "model.architecture.hidden_size=64")
        assert "the server has another model: hidden_size 128, not 64" in reason
        elsewhere = "models.actor.load=runs/nowhere/final"
        (reason,) = server_reasons(tmp_path, url, elsewhere)
        assert "is not on this machine" in reason, "without weights it has only to answer"
    (reason,) = server_reasons(tmp_path, url)
    assert "ConnectError" in reason
    with fake.serving(replace(options, routes=False)) as server:
        url = f"algorithm.rollout.url=http://127.0.0.1:{server.server_port}"
        (reason,) = server_reasons(tmp_path, url)
    assert "; start it with --enable-scale-out and VLLM_SERVER_DEV_MODE=1" in reason


def test_tiny_runs_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(TINY) == 0
    assert capsys.readouterr().out.endswith("tiny/sft: can run here\n")
