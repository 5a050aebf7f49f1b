"""Hugging Face folder -> checkpoint, checkpoint -> Hugging Face folder, in one process; and a run's
own models at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gipo_megatron.conversion.card import model_card
from gipo_megatron.conversion.staging import refuse_existing, staged
from gipo_megatron.conversion.verify import (
    check_outputs,
    check_structure,
    refuse,
    release,
    stored_dtype,
)
from gipo_megatron.data.templates import as_chat_template
from gipo_megatron.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import (
    GROUP_HEAD,
    Seen,
    differing,
    ignore,
    same_group_head,
    save_group_head,
    save_hf,
)
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import load_into
from gipo_megatron.specs import Architecture, HeadSpec, Precision
from gipo_megatron.telemetry.console import Display
from gipo_megatron.training.run_folder import commit
from gipo_megatron.weights.hf_config import (
    architecture_from_hf,
    config_for,
    config_like,
    is_classifier,
    num_labels,
)
from gipo_megatron.weights.hf_files import SHARD_BYTES, open_weights
from gipo_megatron.weights.sources import locate

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TORCH_NAMES = {ours: theirs for theirs, ours in NAMES.items()}
HEADS = {"actor": None, "reference": None, "reward": "score", "critic": "value"}
NOT_COMPARED = "NOT checked (verify=false): outputs against transformers"


@dataclass(frozen=True)
class Model:
    """What one conversion is about."""

    role: str
    architecture: Architecture
    dtype: str  # fp32 | bf16 | fp16
    group: HeadSpec | None = None

    @property
    def head(self) -> str | None:
        return HEADS["reward" if self.role.startswith("reward_") else self.role]

    def engine(self, mesh: Mesh, dtype: str, load: Path, seen: Seen = ignore) -> Engine:
        precision = Precision(dtype)
        engine = Engine(
            mesh,
            self.architecture,
            precision,
            micro_batch=1,
            seed=0,
            head=self.head,
            group=self.group,
            initialise=False,
        )
        load_into(engine, str(load), self.role, seen)
        return engine


# ----------------------------------------------------------------------- Hugging Face -> checkpoint


def to_megatron(hf: str, out: Path, mesh: Mesh, *, verify: bool, progress: Display) -> None:
    """Writes a checkpoint that every role may load, at any layout, from a world of one. Raises
    UserError; `out` then does not exist."""
    refuse_existing(out)
    folder = locate(hf, "hf")
    if checkpoint.kind(folder) != "huggingface":
        raise UserError(
            f"{folder} is a checkpoint already",
            where="hf",
            fix="load it as it is: models.<role>.load takes both kinds",
        )
    model = _model_of(folder)
    there = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = load_tokenizer(str(folder), where="hf") if there else None
    with progress.tensors(f"reading {folder}", _size(folder)) as seen:
        engine = model.engine(mesh, model.dtype, folder, seen)
    with staged(out) as work:
        with progress.waiting("writing the checkpoint"):
            _write_checkpoint(
                work, model.role, engine, hf if not Path(hf).exists() else "", tokenizer
            )
        load_into(engine, str(work), model.role)
        with progress.tensors("comparing tensors", _total(engine)) as seen:
            refuse(
                folder, [("not what was read", differing(folder, engine.export(), mesh, seen=seen))]
            )
        progress.line("all tensors of the checkpoint equal the folder's, bit for bit")
        release(engine)
        if verify:
            with progress.waiting("comparing outputs with transformers, in fp32"):
                progress.line(check_outputs(folder, model.engine(mesh, "fp32", work)))
        else:
            progress.line(NOT_COMPARED)


def _model_of(folder: Path) -> Model:
    """Role and dtype, told by content: a language model, one label, or one label beside a group
    head."""
    architecture = architecture_from_hf(folder)
    config = json.loads((folder / "config.json").read_text())
    if is_classifier(config) and num_labels(config) != 1:
        what = (
            f"a classifier with num_labels {num_labels(config)}; reward models and critics have one"
        )
        raise UserError(what, where=str(folder / "config.json"), fix="train it with num_labels=1")
    role = (
        "actor"
        if not is_classifier(config)
        else "critic"
        if (folder / GROUP_HEAD).is_file()
        else "reward"
    )
    group = _saved_group(folder) if role == "critic" else None
    return Model(role, architecture, NAMES[stored_dtype(open_weights(folder))], group)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _saved_group(folder: Path) -> HeadSpec:
    with safe_open(folder / GROUP_HEAD, framework="pt") as saved:
        return HeadSpec(
            saved.get_slice("weight").get_shape()[0], saved.metadata()["input"], detach_trunk=True
        )


def _write_checkpoint(
    out: Path, role: str, engine: Engine, hub: str, tokenizer: Tokenizer | None
) -> None:
    mesh = engine.mesh
    meta: dict[str, Any] = {
        "step": 0,
        "recipe": "",
        "hub": hub,
        "commit": commit(),
        "parallel": vars(mesh.parallel),
    }
    if tokenizer is not None:
        meta |= {"tokenizer": tokenizer.fingerprint, "chat_template": tokenizer.chat_template}
    extra: Callable[[Path], None] | None = (
        None if tokenizer is None else lambda work: tokenizer.save(work / "tokenizer")
    )
    checkpoint.write(out, {role: engine}, mesh, {}, meta, extra)


# ----------------------------------------------------------------------- checkpoint -> Hugging Face


def to_hf(
    path: Path,
    out: Path,
    mesh: Mesh,
    *,
    role: str = "",
    verify: bool,
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes one role of a checkpoint as a Hugging Face folder, in a world of one, whatever layout
    it was trained in.

    role: "" is the policy, or the only one there is. Raises UserError (then `out` does not exist),
    Mismatch (then OUT.mismatch does).
    """
    refuse_existing(out)
    meta = checkpoint.read_meta(path)
    role = _role_of(meta, role, path)
    about = meta["roles"][role]
    if "dtype" not in about:
        fix = (
            "continue that run by one step, or load the checkpoint in a new run, and convert what"
            " it writes"
        )
        raise UserError(
            "this checkpoint was written before conversions were built; it does not say its dtype",
            where=str(path),
            fix=fix,
        )
    group = (
        None
        if about["num_groups"] is None
        else HeadSpec(about["num_groups"], about["group_input"], detach_trunk=True)
    )
    model = Model(role, Architecture(**about["architecture"]), about["dtype"], group)
    tokenizer = (
        load_tokenizer(str(path / "tokenizer"), where=str(path))
        if (path / "tokenizer").is_dir()
        else None
    )
    with progress.waiting(f"reading {path}"):
        engine = model.engine(mesh, model.dtype, path)
    with staged(out) as work:
        padding = _write_folder(work, engine, tokenizer, meta, progress, shard_bytes)
        checks = _check_written(work, engine, progress)
        release(engine)
        if verify:
            with progress.waiting("comparing outputs with transformers, in fp32"):
                checks.append(check_outputs(work, model.engine(mesh, "fp32", path)))
        else:
            checks.append(NOT_COMPARED)
        for line in checks:
            progress.line(line)
        card = model_card(role, about, meta, padding=padding, checks=checks)
        (work / "README.md").write_text(card, encoding="utf-8")


def _role_of(meta: dict[str, Any], role: str, path: Path) -> str:
    there = list(meta["roles"])
    chosen = role or ("actor" if "actor" in there else there[0])
    if chosen not in there:
        raise UserError(
            f"the checkpoint has no {chosen!r}",
            where=str(path),
            fix=f"role={' or role='.join(there)}",
        )
    return chosen


def export_run(
    out: Path,
    role: str,
    engine: Engine,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    progress: Display,
) -> None:
    """A run's model as a Hugging Face folder, at the run's own layout, replacing an older one.
    Collective; rank 0 writes.

    Everything is checked but the outputs, for which a whole second model would have to be in
    memory.
    """
    about = checkpoint.describe(engine)
    if not engine.mesh.is_main:
        _others(engine)
        return
    with staged(out) as work:
        padding = _write_folder(work, engine, tokenizer, meta, progress)
        checks = [
            *_check_written(work, engine, progress),
            "NOT checked: outputs against transformers (tools/megatron_to_hf.py does it)",
        ]
        (work / "README.md").write_text(
            model_card(role, about, meta, padding=padding, checks=checks), encoding="utf-8"
        )


def _others(engine: Engine) -> None:
    """What the ranks do that do not write: their part in two exports."""
    if engine.group_head is not None:
        engine.group_head.broadcast()
    for _ in range(2):
        for _ in engine.export():
            pass


def _write_folder(
    work: Path,
    engine: Engine,
    tokenizer: Tokenizer | None,
    meta: dict[str, Any],
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> str | None:
    """Weights, config.json, generation_config.json, tokenizer, group head. Returns what a model
    with a head may be padded with."""
    if engine.group_head is not None:
        engine.group_head.broadcast()
        save_group_head(work, engine.group_head)
    with progress.tensors("writing", _total(engine)) as seen:
        save_hf(work, engine.export(), engine.mesh, shard_bytes=shard_bytes, seen=seen)
    padding = None
    if tokenizer is not None:
        if "template" in meta:
            tokenizer = tokenizer.with_chat_template(
                as_chat_template(meta["template"], tokenizer, meta["style"])
            )
        if engine.head is not None and (padding := tokenizer.scoring_pad()) is not None:
            tokenizer = tokenizer.with_padding(padding)
        tokenizer.save(work)
    (work / "config.json").write_text(
        _config(engine, tokenizer, padding is not None), encoding="utf-8"
    )
    if engine.head is None and (text := _generation_config(engine, tokenizer)):
        (work / "generation_config.json").write_text(text, encoding="utf-8")
    return padding


def _config(engine: Engine, tokenizer: Tokenizer | None, padded: bool) -> str:
    """The one the model came with, where it came from Hugging Face; else one for its
    architecture."""
    dtype = TORCH_NAMES[engine.precision.dtype]
    pad_id = tokenizer.pad_id if tokenizer is not None and padded else None
    if "config.json" in engine.hf_files:
        return config_like(
            engine.hf_files["config.json"], dtype, head=engine.head, pad_token_id=pad_id
        )
    tokens: dict[str, Any] = {} if tokenizer is None else _special_ids(tokenizer)
    if engine.head is not None:
        tokens["pad_token_id"] = pad_id
    return (
        json.dumps(
            config_for(engine.architecture, dtype, head=engine.head, tokens=tokens), indent=2
        )
        + "\n"
    )


def _generation_config(engine: Engine, tokenizer: Tokenizer | None) -> str:
    if "config.json" in engine.hf_files:
        return engine.hf_files.get("generation_config.json", "")
    return "" if tokenizer is None else json.dumps(_special_ids(tokenizer), indent=2) + "\n"


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.inner.pad_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}


def _check_written(work: Path, engine: Engine, progress: Display) -> list[str]:
    with progress.tensors("comparing tensors", _total(engine)) as seen:
        different = differing(work, engine.export(), engine.mesh, seen=seen)
    if engine.group_head is not None and not same_group_head(work, engine.group_head):
        different.append(GROUP_HEAD)
    refuse(work, [("not what was written", different)])
    return [
        check_structure(work, TORCH_NAMES[engine.precision.dtype]),
        "all tensors read back, bit for bit",
    ]


def _total(engine: Engine) -> int:
    """Bytes of this rank's weights times the ranks of a replica: close enough for a progress
    bar."""
    return (
        sum(p.nbytes for chunk in engine.chunks for p in chunk.parameters())
        * engine.mesh.parallel.model
    )
