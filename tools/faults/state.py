"""Damaged checkpoints: one message that names the checkpoint, exit code 2, and nothing is changed.
Without the damage the same command continues."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gipo_megatron import launcher
from gipo_megatron.megatron.stored import read_index
from tools.faults import runs, world
from tools.faults.trial import Bench, Trial, expect

TRUNCATED = "checkpoint: a truncated file"
OVERWRITTEN = "checkpoint: other bytes of the same length"
TENSORS = "checkpoint: a tensor is missing"
OTHER = "checkpoint: of another model, version or kind"
SURVIVED = {
    TRUNCATED: "exit code 2, the file is named, nothing is changed; when the checkpoint is removed,"
    " the run continues from the one before, to the same bits",
    OVERWRITTEN: "exit code 2, the file is named, nothing is changed",
    TENSORS: "exit code 2, the tensor is named, nothing is changed",
    OTHER: "exit code 2, the difference is named, nothing is changed",
}
SFT = ("run.steps=4", "run.save_every=1", "run.keep=9", "run.eval_every=0")
LAST = Path("run", "checkpoints", "step_3")
LOADED = ("train", *runs.sft(Path("new"), f"models.actor.load={LAST}"))
EXPORTED = ("convert", "to-hf", f"checkpoint={LAST}", "out=out")
ADAPTED = "model.adapter.rank=4"
SCREEN = 24  # lines of a message
LAYER = "decoder.layers.1.mlp.linear_fc1.weight"
STACKED = "decoder.layers.mlp.linear_fc1.weight"  # mcore stores the layers of one tensor together
FILES = (
    "meta.json",
    "state.pt",
    "recipe.yaml",
    "tokenizer/tokenizer.json",
    "actor/.metadata",
    "actor/metadata.json",
    "actor/common.pt",
    "actor/__0_0.distcp",
)
UNREAD = ("meta.json", "recipe.yaml", "tokenizer/tokenizer.json")  # or has no digest itself


def trials() -> list[Trial]:
    return [*_files(), *_contents(), *_others()]


# ---------- the checks


def _run(bench: Bench, *more: str) -> list[str]:
    """Put a run of four steps, broken off after the third, into the trial's folder; return the
    command that continues it."""
    words = ("train", *runs.sft(Path("run"), *SFT, *more))
    name = "state" + "".join(c if c.isalnum() else "_" for c in "".join(more))
    reference = runs.finished(bench.base / name, *words)
    shutil.copytree(reference / "run", bench.folder / "run", symlinks=True)
    (bench.folder / "run" / "final").unlink()
    shutil.rmtree(bench.folder / "run" / "checkpoints" / "step_4")
    return list(words)


def failed(
    bench: Bench, words: list[str], ranks: int, before: Callable[[int], None] | None = None
) -> str:
    """Check that a command ends with one message and exit code 2 on every rank, of which the first
    that fails ends the others, as the launcher does; return the message."""
    folder = bench.folder
    with world.world(world.GIPO, *words, ranks=ranks, folder=folder, before=before) as running:
        running.until(lambda: any(running.ended(rank) for rank in range(ranks)))
        time.sleep(launcher.PATIENCE[0])
        running.signal(signal.SIGTERM)
        done = running.wait()
    lines = done.stderr.splitlines()
    expect(set(done.codes) == {2}, done.tail())
    expect("Traceback" not in done.stderr and len(lines) <= SCREEN, done.tail())
    return done.stderr


def refused(bench: Bench, words: list[str], *names: str, ranks: int = 1) -> str:
    """Check that a command is refused with one message that has all `names`; return it."""
    before = runs.tree(bench.folder)
    text = failed(bench, words, ranks)
    missing = [name for name in names if name not in text]
    expect(not missing, f"{missing} not in: {text}")
    expect(runs.tree(bench.folder) == before, "files were changed")
    return text


def _continues(bench: Bench, words: list[str]) -> None:
    """Check that the command goes on to the bits of a run without a fault."""
    done = world.run(world.GIPO, *words, folder=bench.folder)
    expect(done.codes == (0,) and not done.stderr, done.tail())
    different = runs.difference(bench.folder / "run", bench.base / "state" / "run")
    expect(not different, different)


def _sized(step: Path) -> None:
    """Give meta.json the sizes that the files have now, and no digests: the first ones had none."""
    meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
    meta["files"] = {name: (step / name).stat().st_size for name in meta["files"]}
    meta["digests"] = None
    (step / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


# ---------- files of the wrong length


def _files() -> Iterator[Trial]:
    for file in FILES:
        yield Trial(TRUNCATED, file, partial(_truncated, file), small=file == FILES[-1])
    for file in FILES:
        yield Trial(OVERWRITTEN, file, partial(_overwritten, file))
    yield Trial(OVERWRITTEN, "one number of a tensor", _one_number)
    yield Trial(TRUNCATED, "removed", _removed)


def _truncated(file: str, bench: Bench) -> None:
    words = _run(bench)
    damaged = bench.folder / LAST / file
    whole = damaged.read_bytes()
    for length in (0, bench.random.randrange(1, len(whole) - 2), len(whole) - 2):
        os.truncate(damaged, length)
        refused(bench, words, file.rpartition("/")[2], "step_3")
        damaged.write_bytes(whole)
    _continues(bench, words)


def _removed(bench: Bench) -> None:
    words = _run(bench)
    for file in FILES[1:]:
        kept = (bench.folder / LAST / file).rename(bench.folder / "kept")
        refused(bench, words, file, "is missing")
        kept.rename(bench.folder / LAST / file)
    shutil.rmtree(bench.folder / LAST)
    _continues(bench, words)


def _overwritten(file: str, bench: Bench) -> None:
    """Zeros, as a power cut leaves them, and noise: of the whole file, and of its end. The same
    for a checkpoint without digests and a file of it that a resumed run reads."""
    words = _run(bench)
    damaged = bench.folder / LAST / file
    whole = damaged.read_bytes()
    contents = [
        whole[:begin] + filler(len(whole) - begin)
        for begin in (0, len(whole) // 2)
        for filler in (bytes, bench.random.randbytes)
    ]
    for content in contents:
        damaged.write_bytes(content)
        refused(bench, words, file.rpartition("/")[2], "step_3")
    if file in UNREAD:
        return
    damaged.write_bytes(whole)
    _sized(bench.folder / LAST)
    for content in contents:
        damaged.write_bytes(content)
        refused(bench, words, "step_3")


def _one_number(bench: Bench) -> None:
    words = _run(bench)
    damaged = bench.folder / LAST / "actor" / "__0_0.distcp"
    stored = damaged.read_bytes()
    index: Any = read_index(damaged.parent)
    place = next(at for key, at in index.storage_data.items() if key.fqn == STACKED)
    middle = place.offset + place.length // 2
    damaged.write_bytes(stored[:middle] + b"\0\0\0\x3f" + stored[middle + 4 :])
    for other in (words, LOADED, EXPORTED):
        refused(bench, list(other), damaged.name, "step_3")


# ---------- tensors that are there or are not


def _contents() -> Iterator[Trial]:
    for key in (LAYER, "embedding.word_embeddings.weight", "optimizer"):
        yield Trial(TENSORS, key, partial(_without_tensor, key))
    yield Trial(TENSORS, "learning_rate", partial(_without_common, "learning_rate"))
    for system in ("models.actor.load", "convert to-hf"):
        yield Trial(TENSORS, f"{LAYER}, {system}", partial(_not_loaded, system))


def _drop(step: Path, wanted: str) -> str:
    """Take one tensor out of the checkpoint's list; return its name."""
    file = step / "actor" / ".metadata"
    metadata: Any = read_index(file.parent)
    tensors = metadata.state_dict_metadata
    key = next(name for name in sorted(tensors) if _same(wanted, name))
    del tensors[key]
    metadata.storage_data = {
        index: place for index, place in metadata.storage_data.items() if index.fqn != key
    }
    file.write_bytes(pickle.dumps(metadata))
    _sized(step)
    return key


def _same(wanted: str, name: str) -> bool:
    return name in (wanted, STACKED if wanted == LAYER else "") or (
        wanted == "optimizer" and name.startswith("optimizer.")
    )


def _without_tensor(wanted: str, bench: Bench) -> None:
    words = _run(bench)
    key = _drop(bench.folder / LAST, wanted)
    refused(bench, words, key, "step_3")


def _without_common(key: str, bench: Bench) -> None:
    words = _run(bench)
    file = bench.folder / LAST / "actor" / "common.pt"
    common = torch.load(file, weights_only=True)
    del common[key]
    torch.save(common, file)
    _sized(bench.folder / LAST)
    refused(bench, words, key, "step_3")


def _not_loaded(system: str, bench: Bench) -> None:
    _run(bench)
    key = _drop(bench.folder / LAST, LAYER)
    words = EXPORTED if system == "convert to-hf" else LOADED
    refused(bench, list(words), key, "step_3")


# ---------- checkpoints of something else


def _others() -> Iterator[Trial]:
    loads: dict[str, Callable[[Bench], None]] = {
        "another architecture, resumed": partial(
            _resumed_with, "num_layers: there 4, here 2", "model.architecture.num_layers=2"
        ),
        "another architecture, loaded": _loaded_deeper,
        "a newer version": partial(_edited, "version", 99, "version 99 is newer than"),
        "of another program": partial(_edited, "format", "other", "neither a checkpoint"),
        "a whole model, where the run has adapters": partial(
            _resumed_with, "was saved as a whole model", ADAPTED
        ),
        "adapters, where the run has none": _adapters_resumed,
        "adapters, loaded into a whole model": _adapters_loaded,
        "a reward model, resumed as a policy": _reward_resumed,
    }
    for case, run in loads.items():
        yield Trial(OTHER, case, run)


def _resumed_with(named: str, word: str, bench: Bench) -> None:
    words = _run(bench)
    refused(bench, [*words, word], named, "step_3")
    _continues(bench, words)


def _loaded_deeper(bench: Bench) -> None:
    _run(bench)
    deeper = ("model.architecture.num_layers=2", f"models.actor.load={LAST}")
    refused(bench, ["train", *runs.sft(Path("new"), *deeper)], "num_layers 2 ≠ 4")


def _edited(key: str, value: object, named: str, bench: Bench) -> None:
    words = _run(bench)
    meta = bench.folder / LAST / "meta.json"
    whole = meta.read_text(encoding="utf-8")
    meta.write_text(json.dumps({**json.loads(whole), key: value}), encoding="utf-8")
    refused(bench, words, named, "step_3")
    refused(bench, list(LOADED), named)
    refused(bench, list(EXPORTED), named, "step_3")
    meta.write_text(whole, encoding="utf-8")
    _continues(bench, words)


def _adapters_resumed(bench: Bench) -> None:
    words = _run(bench, ADAPTED)
    words.remove(ADAPTED)
    refused(bench, words, "other adapters", "step_3")


def _adapters_loaded(bench: Bench) -> None:
    _run(bench, ADAPTED)
    refused(bench, list(LOADED), "other adapters", "step_3")


def _reward_resumed(bench: Bench) -> None:
    words = _run(bench)
    shutil.rmtree(bench.folder / LAST)
    shutil.copytree(runs.trained(bench.base) / "rm" / "final", bench.folder / LAST)
    refused(bench, words, "no 'actor'", "step_3")
