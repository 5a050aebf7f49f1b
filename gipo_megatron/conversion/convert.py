"""Hugging Face folder -> checkpoint and checkpoint -> Hugging Face folder, in one process; PEFT's
adapters, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gipo_megatron.conversion.card import model_card
from gipo_megatron.conversion.export import (
    NOT_COMPARED,
    base_name,
    check_folder,
    tensors,
    total_bytes,
    write_folder,
)
from gipo_megatron.conversion.staging import refuse_existing, staged
from gipo_megatron.conversion.verify import check_outputs, refuse, release, stored_dtype
from gipo_megatron.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from gipo_megatron.environment import commit
from gipo_megatron.errors import UserError
from gipo_megatron.files import read_object
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine, load_into
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import GROUP_HEAD, Seen, differing, ignore, saved_group_head
from gipo_megatron.megatron.hf_table import HF_SCORE
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import AdapterSpec, Precision
from gipo_megatron.telemetry.console import Display
from gipo_megatron.weights.architecture import folder_architecture
from gipo_megatron.weights.checkpoints import CheckpointMeta, RoleMeta, read_meta, weights_kind
from gipo_megatron.weights.hf_config import is_classifier, num_labels
from gipo_megatron.weights.hf_files import OUR_DTYPES, SHARD_BYTES, open_weights
from gipo_megatron.weights.hf_values import FIX
from gipo_megatron.weights.peft_config import spec_of
from gipo_megatron.weights.sources import adapted_model, locate


def _engine(
    role: str, model: RoleMeta, mesh: Mesh, load: Path, dtype: str | None, seen: Seen = ignore
) -> Engine:
    assert dtype is not None
    return build_engine(
        role,
        mesh,
        model.architecture,
        Precision(dtype),
        load=str(load),
        group=model.group,
        adapter=model.adapter or AdapterSpec(),
        seen=seen,
    )


def _compared(
    role: str, model: RoleMeta, mesh: Mesh, load: Path, folder: Path, progress: Display
) -> str:
    """Return one line on the outputs of `load`, in fp32, against the library's of `folder`."""
    with progress.waiting("comparing outputs, in fp32"):
        return check_outputs(folder, _engine(role, model, mesh, load, "fp32"))


# ----------------------------------------------------------------------- Hugging Face -> checkpoint


def to_megatron(hf: str, out: Path, mesh: Mesh, *, verify: bool, progress: Display) -> None:
    """Write a checkpoint that every role may load, at any layout, in a world of one.

    Raises UserError; `out` then does not exist.
    """
    refuse_existing(out)
    folder = locate(hf, "hf")
    if weights_kind(folder) == "checkpoint":
        raise UserError(
            f"{folder} is a checkpoint already",
            where="hf",
            fix="load it as it is: models.<role>.load takes all kinds",
        )
    role, model = _model_of(folder)
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = load_tokenizer(str(folder), where="hf") if has_tokenizer else None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress.tensors(f"reading {folder}", size) as seen:
        engine = _engine(role, model, mesh, folder, model.dtype, seen)
    with staged(out) as work:
        with progress.waiting("writing the checkpoint"):
            hub = "" if Path(hf).exists() else hf
            _write_checkpoint(work, role, engine, hub, tokenizer)
        load_into(engine, str(work), role)
        kind = {"adapters": model.adapter is not None}
        with progress.tensors("comparing tensors", total_bytes(engine, **kind)) as seen:
            different = differing(folder, tensors(engine, **kind), mesh, seen=seen)
        refuse(folder, [("not what was read", different)])
        progress.line("all tensors of the checkpoint equal the folder's, bit for bit")
        release(engine)
        compared = NOT_COMPARED
        if verify:
            compared = _compared(role, model, mesh, work, folder, progress)
        progress.line(compared)


def _model_of(folder: Path) -> tuple[str, RoleMeta]:
    """Return role and description, judged by content: a language model, one label, or one label
    beside a group head; whole, or adapters and the model that they belong to."""
    spec, home = None, folder
    if weights_kind(folder) == "adapter":
        spec, home = spec_of(folder), adapted_model(folder)
    architecture = folder_architecture(home)
    config = read_object(home / "config.json", FIX)
    weights = [open_weights(place) for place in dict.fromkeys((folder, home))]
    role, groups, token = "actor", None, None
    if is_classifier(config) or any(HF_SCORE in stored.shapes for stored in weights):
        if is_classifier(config) and num_labels(config) != 1:
            raise UserError(
                f"a classifier with num_labels {num_labels(config)}; reward models and critics have"
                " one",
                where=str(home / "config.json"),
                fix="train it with num_labels=1",
            )
        role = "reward"
        if (folder / GROUP_HEAD).is_file():
            role = "critic"
            groups, token = saved_group_head(folder)
    dtype = OUR_DTYPES[stored_dtype(*weights)]
    return role, RoleMeta(
        architecture, dtype=dtype, num_groups=groups, group_input=token, adapter=spec
    )


def _write_checkpoint(
    out: Path, role: str, engine: Engine, hub: str, tokenizer: Tokenizer | None
) -> None:
    meta = CheckpointMeta(
        hub=hub,
        commit=commit(),
        parallel=vars(engine.mesh.parallel),
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        chat_template=tokenizer.chat_template if tokenizer else None,
    )
    extra = (lambda work: tokenizer.save(work / "tokenizer")) if tokenizer else None
    checkpoint.write(out, {role: engine}, engine.mesh, meta, extra_files=extra)


# ----------------------------------------------------------------------- checkpoint -> Hugging Face


def to_hf(
    path: Path,
    out: Path,
    mesh: Mesh,
    *,
    role: str = "",
    merge: bool = False,
    verify: bool,
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write one role of a checkpoint as a Hugging Face folder, in a world of one, from any layout.

    role: "" is the policy, or the only role; merge: write the whole model, not the adapters alone.
    Raises UserError (then `out` does not exist), Mismatch (then OUT.mismatch does).
    """
    refuse_existing(out)
    meta = read_meta(path)
    role = role or ("actor" if "actor" in meta.roles else next(iter(meta.roles), "actor"))
    if role not in meta.roles:
        raise UserError(
            f"the checkpoint has no {role!r}",
            where=str(path),
            fix=" or ".join(f"role={name}" for name in meta.roles) or "use another checkpoint",
        )
    about = meta.roles[role]
    if about.dtype is None:
        raise UserError(
            "this checkpoint was written before conversions were built; its dtype is not recorded",
            where=str(path),
            fix=(
                "continue that run by one step, or load the checkpoint in a new run, and convert"
                " the new checkpoint"
            ),
        )
    base = _base_of(about, path, merge)
    home = path / "tokenizer"
    tokenizer = load_tokenizer(str(home), where=str(path)) if home.is_dir() else None
    with progress.waiting(f"reading {path}"):
        engine = _engine(role, about, mesh, path, about.dtype)
    with staged(out) as work:
        padding = write_folder(work, engine, base, tokenizer, meta, progress, shard_bytes)
        checks = check_folder(work, engine, base, progress)
        release(engine)
        compared = NOT_COMPARED
        if verify and merge:  # the sum is rounded to its dtype, so its own outputs are compared
            whole = replace(about, adapter=None, base=None)
            compared = _compared(role, whole, mesh, work, work, progress)
        elif verify:
            compared = _compared(role, about, mesh, path, work, progress)
        checks.append(compared)
        for line in checks:
            progress.line(line)
        card = model_card(role, about, meta, base=base, padding=padding, checks=checks)
        (work / "README.md").write_text(card, encoding="utf-8")


def _base_of(about: RoleMeta, path: Path, merge: bool) -> str:
    """Return the name of the model to write adapters for; empty for a whole model. Raises UserError
    where the checkpoint has no adapters to merge, or PEFT could not load their model."""
    if about.adapter is None:
        if merge:
            what = "merge=true: this model has no adapters, it is whole"
            raise UserError(what, where=str(path), fix="leave merge out")
        return ""
    if merge:
        return ""
    if not (base := base_name(about.base)):
        source = about.base.source if about.base is not None else ""
        raise UserError(
            "PEFT cannot load the base of these adapters: it is"
            f" {source or 'random'}, no Hugging Face model",
            where=str(path),
            fix="write the whole model: merge=true",
        )
    return base
