"""What goes wrong with folders: one message that names it, and nothing under the final name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gipo_megatron import cli
from gipo_megatron.commands.words import arguments
from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.conversion.staging import Mismatch, staged
from gipo_megatron.conversion.verify import check_structure
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.telemetry.console import Display
from gipo_megatron.training.run_lock import RunLock
from tests.conversion import families
from tests.forked import ROOT

pytestmark = pytest.mark.global_rng
SILENT = Display(shown=False)
Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return families.write_hf(tmp_path / "hf", "llama3_tied")


@pytest.fixture(scope="module")
def checkpoint(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("checkpoint")
    to_megatron(
        str(families.write_hf(base / "hf", "qwen3")),
        base / "checkpoint",
        mesh,
        verify=False,
        progress=SILENT,
    )
    return base / "checkpoint"


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(which: int, edit: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(shards(folder)[which])
        edit(tensors)
        save_file(tensors, shards(folder)[which])

    return change


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])
    tensors["rotary_emb.inv_freq"] = torch.zeros(1)  # a file cannot be empty


def own_output_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(261, 36)


def without_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def index(text: str) -> Change:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


BROKEN: dict[str, tuple[Change, list[str]]] = {
    "unsupported": (
        config(model_type="gemma2"),
        ["model_type 'gemma2' is not built", "soft-caps attention logits"],
    ),
    "rope": (
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        ["not built: rope_type: yarn"],
    ),
    "quantised": (
        config(quantization_config={"quant_method": "awq"}),
        ["not built: quantization_config: awq"],
    ),
    "missing shard": (
        lambda folder: shards(folder)[2].unlink(),
        ["cannot read model-00003-of-", "missing"],
    ),
    "truncated": (
        lambda folder: os.truncate(shards(folder)[2], 20_000),
        ["cannot read model-00003-of-", "20000 bytes"],
    ),
    "header cut": (
        lambda folder: os.truncate(shards(folder)[0], 5),
        ["cannot read model-00001-of-", "5 bytes"],
    ),
    "tensor gone": (rewrite(1, drop_one), ["lists tensors that its files do not hold"]),
    "other sizes": (
        config(intermediate_size=64, vocab_size=300),
        ["vocab_size 300, by the tensors 261", "intermediate_size 64, by the tensors 50"],
    ),
    "more layers": (config(num_hidden_layers=7), ["num_hidden_layers 7, by the tensors 6"]),
    "fewer layers": (config(num_hidden_layers=5), ["num_hidden_layers 5, by the tensors 6"]),
    "untied": (config(tie_word_embeddings=False), ["missing (1): lm_head.weight"]),
    "tied in vain": (
        rewrite(0, own_output_layer),
        ["tie_word_embeddings is true, but lm_head.weight differs"],
    ),
    "integers": (
        rewrite(1, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
        ["I8", "quantised weights"],
    ),
    "no sizes": (
        config(num_attention_heads=0),
        ["num_attention_heads: 0 is not a whole number above 0"],
    ),
    "config.json": (without_config, ["cannot read config.json"]),
    "index": (index("{}"), ["weight_map: None is not an object"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_do_not_hold_what_they_claim(
    name: str, folder: Path, mesh: Mesh, tmp_path: Path
) -> None:
    change, said = BROKEN[name]
    change(folder)
    with pytest.raises(UserError) as error:
        to_megatron(str(folder), tmp_path / "out", mesh, verify=True, progress=SILENT)
    assert all(text in str(error.value) for text in said), error.value
    assert error.value.where and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_two_labels(mesh: Mesh, tmp_path: Path) -> None:
    families.write_hf(tmp_path / "hf", "llama_scorer", num_labels=2)
    with pytest.raises(UserError, match="num_labels 2"):
        to_megatron(str(tmp_path / "hf"), tmp_path / "out", mesh, verify=True, progress=SILENT)


def test_nothing_is_overwritten(folder: Path, checkpoint: Path, mesh: Mesh) -> None:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UserError, match="exists already"):
        to_hf(checkpoint, folder, mesh, verify=False, progress=SILENT)
    with pytest.raises(UserError, match="exists already"):
        to_megatron(str(folder), checkpoint, mesh, verify=False, progress=SILENT)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_what_is_none_of_the_two(
    folder: Path, checkpoint: Path, mesh: Mesh, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a checkpoint already"):
        to_megatron(str(checkpoint), tmp_path / "out", mesh, verify=True, progress=SILENT)
    with pytest.raises(UserError, match="is a Hugging Face folder, not a checkpoint"):
        to_hf(folder, tmp_path / "out", mesh, verify=True, progress=SILENT)
    with pytest.raises(UserError, match="has no 'critic'") as error:
        to_hf(checkpoint, tmp_path / "out", mesh, role="critic", verify=True, progress=SILENT)
    assert error.value.fix == "role=actor"


# ------------------------------------------------------------------------------------- verification


def test_a_mismatch_keeps_the_folder_and_names_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(Mismatch) as error, staged(tmp_path / "out") as work:
        families.write_hf(work, "qwen2")
        tensors = load_file(shards(work)[0])
        tensors["model.extra"] = tensors.pop(sorted(tensors)[0])
        save_file(tensors, shards(work)[0])
        (work / "model.safetensors.index.json").unlink()
        for number, file in enumerate(shards(work)):
            file.rename(work / ("model.safetensors" if number == 0 else f"other-{number}"))
        check_structure(work, "float32")
    assert "not in transformers' model (1): model.extra" in str(error.value) and "missing" in str(
        error.value
    )
    assert error.value.where == str(tmp_path / "out.mismatch")
    assert [p.name for p in tmp_path.iterdir()] == ["out.mismatch"] and (
        tmp_path / "out.mismatch" / "config.json"
    ).is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config(rope_parameters={"rope_type": "default", "rope_theta": 2e4}), "logits differ by"),
        (config(rms_norm_eps=1e-2), "logits differ by"),
    ],
)
def test_outputs_tell_what_shapes_cannot(
    change: Change, said: str, checkpoint: Path, mesh: Mesh, tmp_path: Path
) -> None:
    """A checkpoint whose config.json was altered after it was read: every tensor agrees, the model
    is another one."""
    altered = Path(shutil.copytree(checkpoint, tmp_path / "altered"))
    source = altered / "huggingface" / "actor"
    change(source)
    meta = json.loads((altered / "meta.json").read_text())
    meta["files"]["huggingface/actor/config.json"] = (source / "config.json").stat().st_size
    (altered / "meta.json").write_text(json.dumps({**meta, "digests": None}))
    with pytest.raises(Mismatch, match=said):
        to_hf(altered, tmp_path / "out", mesh, verify=True, progress=SILENT)
    assert (
        not (tmp_path / "out").exists()
        and (tmp_path / "out.mismatch" / "model.safetensors").is_file()
    )


def test_what_a_kill_left_beside_the_folder_is_replaced(tmp_path: Path) -> None:
    """OUT.partial, and OUT.old of a kill between two renames."""
    for name in ("out", "out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with staged(tmp_path / "out") as work:
        (work / "new").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/new"]


@pytest.mark.parametrize("direction", ["from-hf hf", "to-hf checkpoint"])
def test_two_conversions_to_one_folder(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(tmp_path / "out", tmp_path / "out.lock", "out") as lock:
        lock.take()
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", *f"{direction}=in out={tmp_path}/out".split()])
    error = capsys.readouterr().err
    assert f"out is in use by another run: process {os.getpid()} on " in error


# ----------------------------------------------------------------------------- as started by a user


def small_files() -> None:
    """The nearest thing to a full disk that needs no disk: files of at most 100 kB (Python ignores
    the signal)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf"])
def test_a_full_disk(tool: str, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = [f"hf={folder}"] if tool == "hf_to_megatron" else [f"checkpoint={checkpoint}"]
    command = [sys.executable, f"tools/{tool}.py", *words, f"out={tmp_path}/out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and "File too large" in done.stderr
        and f"{tmp_path}/out" in done.stderr
    )
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hf=a"], "missing: out="),
        (["hf=a", "out=b", "verbose=1"], "unknown word 'verbose=1'"),
        (["hf=a", "out=b", "verify=no"], "verify is true or false"),
    ],
)
def test_words(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        arguments(words, ("hf", "out"), {"verify": "true"})
