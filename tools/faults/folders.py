"""Damaged Hugging Face folders, and weights that are not finite: exit code 2, and the file or
tensor is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.faults import runs, world
from tools.faults.state import LAYER, SFT, failed, refused
from tools.faults.systems import LAYOUTS
from tools.faults.trial import Bench, Trial, expect

FOLDER = "Hugging Face folder: damaged"
WEIGHTS = "NaN or infinity in weights"
SURVIVED = {
    FOLDER: "exit code 2, the file or tensor is named, nothing is changed",
    WEIGHTS: "exit code 2, the tensor is named, the same at all layouts; none is saved",
}
HF_LAYER = "model.layers.1.mlp.up_proj.weight"
SINGLE = "model.safetensors"


def trials() -> list[Trial]:
    return [*_folders(), *_weights()]


# ---------- Hugging Face folders


def _folders() -> Iterator[Trial]:
    for case, (change, named) in FOLDERS.items():
        yield Trial(FOLDER, case, partial(_folder, change, named))


def _folder(change: Callable[[Path], None], named: str, bench: Bench) -> None:
    """Load the folder for training, and convert it."""
    folder = bench.folder / "hf"
    shutil.copytree(runs.trained(bench.base) / "sft" / "hf", folder)
    change(folder)
    load = ("models.actor.load=hf", "model.tokenizer=bytes")
    refused(bench, ["train", *runs.sft(Path("new"), *load)], named, "hf")
    refused(bench, ["convert", "from-hf", "hf=hf", "out=out", "verify=false"], named, "hf")


def _cut(share: float, folder: Path) -> None:
    file = folder / SINGLE
    os.truncate(file, int(file.stat().st_size * share))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any], folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _index(folder: Path) -> None:
    """Two shards, of which one is not there."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-1.safetensors")
    weight_map = {name: f"model-{1 if name in names[:3] else 2}.safetensors" for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / SINGLE).unlink()


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (partial(_cut, 0.0), SINGLE),
    "cut in the header": (partial(_cut, 0.001), SINGLE),
    "cut in the middle": (partial(_cut, 0.5), SINGLE),
    "cut at the end": (partial(_cut, 0.999), SINGLE),
    "an index with a file that is not there": (_index, "model-2.safetensors (missing)"),
    "a tensor is missing": (partial(_tensors, lambda t: t.pop(HF_LAYER)), HF_LAYER),
    "a tensor too many": (partial(_tensors, lambda t: t.update(x=torch.ones(1))), "x"),
    "a wrong shape": (
        partial(_tensors, lambda t: t.update({HF_LAYER: torch.ones(3, 3)})),
        f"{HF_LAYER} is [3, 3]",
    ),
    "integers": (
        partial(_tensors, lambda t: t.update({HF_LAYER: t[HF_LAYER].to(torch.int8)})),
        "quantised",
    ),
    "NaN": (
        partial(_tensors, lambda t: t[HF_LAYER].__setitem__((0, 0), torch.nan)),
        f"NaN or infinity in {LAYER}",
    ),
}


# ---------- weights that are not finite


def _weights() -> Iterator[Trial]:
    for layout in LAYOUTS:
        yield Trial(WEIGHTS, f"loaded, {layout}", partial(_nan_loaded, layout))
        yield Trial(WEIGHTS, f"in training, {layout}", partial(_nan_trained, layout))


def _nan_loaded(layout: str, bench: Bench) -> None:
    folder = bench.folder / "hf"
    shutil.copytree(runs.trained(bench.base) / "sft" / "hf", folder)
    FOLDERS["NaN"][0](folder)
    ranks, words = LAYOUTS[layout]
    words = ("models.actor.load=hf", *words)
    text = refused(bench, ["train", *runs.sft(Path("new"), *words)], ranks=ranks)
    expect(text.startswith(f"NaN or infinity in {LAYER}\n  where: hf\n"), text)


def _nan_trained(layout: str, bench: Bench) -> None:
    """The third step leaves an infinity in one weight: no checkpoint has it, and the run goes on
    from the second."""
    ranks, words = LAYOUTS[layout]
    command = ["train", *runs.sft(Path("run"), *SFT, *words)]
    text = failed(bench, command, ranks, _overflow)
    expect(text.startswith(f"NaN or infinity in {LAYER}"), text)
    names = sorted(path.name for path in (bench.folder / "run" / "checkpoints").iterdir())
    expect(names == ["step_1", "step_2"], f"checkpoints {names}")
    again = world.run(world.GIPO, *command, ranks=ranks, folder=bench.folder)
    expect(again.code == 0 and "resumed from run/checkpoints/step_2" in again.stdout, again.tail())


def _overflow(rank: int) -> None:
    """Put an infinity into a weight after the third step."""
    from gipo_megatron.megatron.engine import Engine
    from gipo_megatron.megatron.param_sharding import placements

    update: Any = Engine.update

    def patched(engine: Engine, *arguments: Any) -> Any:
        done = update(engine, *arguments)
        if engine.learning_rate.steps == 3:
            for chunk in engine.chunks:
                for place, parameter in placements(chunk, engine.architecture.vocab_size):
                    if place.name == LAYER:
                        parameter.data.view(-1)[0] = torch.inf
        return done

    Engine.update = patched  # type: ignore[method-assign, assignment]
