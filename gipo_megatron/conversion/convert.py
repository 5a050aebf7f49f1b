"""Hugging Face folder -> checkpoint and checkpoint -> Hugging Face folder, in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from gipo_megatron.conversion.card import model_card
from gipo_megatron.conversion.export import NOT_COMPARED, check_folder, total_bytes, write_folder
from gipo_megatron.conversion.staging import refuse_existing, staged
from gipo_megatron.conversion.verify import check_outputs, refuse, release, stored_dtype
from gipo_megatron.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from gipo_megatron.environment import commit
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine, load_into
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import GROUP_HEAD, Seen, differing, ignore
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Architecture, HeadSpec, Precision
from gipo_megatron.telemetry.console import Display
from gipo_megatron.weights.checkpoints import CheckpointMeta, read_meta, weights_kind
from gipo_megatron.weights.hf_config import architecture_from_hf, is_classifier, num_labels
from gipo_megatron.weights.hf_files import OUR_DTYPES, SHARD_BYTES, open_weights
from gipo_megatron.weights.sources import locate


@dataclass(frozen=True)
class Model:
    """The model that is converted."""

    role: str
    architecture: Architecture
    dtype: str  # fp32 | bf16 | fp16
    group: HeadSpec | None = None

    def engine(self, mesh: Mesh, dtype: str, load: Path, seen: Seen = ignore) -> Engine:
        return build_engine(
            self.role,
            mesh,
            self.architecture,
            Precision(dtype),
            load=str(load),
            group=self.group,
            seen=seen,
        )

    def compared(self, mesh: Mesh, weights: Path, folder: Path, progress: Display) -> str:
        """Return one line on the outputs of `weights`, in fp32, against transformers' of
        `folder`."""
        with progress.waiting("comparing outputs with transformers, in fp32"):
            return check_outputs(folder, self.engine(mesh, "fp32", weights))


# ----------------------------------------------------------------------- Hugging Face -> checkpoint


def to_megatron(hf: str, out: Path, mesh: Mesh, *, verify: bool, progress: Display) -> None:
    """Write a checkpoint that every role may load, at any layout, in a world of one.

    Raises UserError; `out` then does not exist.
    """
    refuse_existing(out)
    folder = locate(hf, "hf")
    if weights_kind(folder) != "huggingface":
        raise UserError(
            f"{folder} is a checkpoint already",
            where="hf",
            fix="load it as it is: models.<role>.load takes both kinds",
        )
    model = _model_of(folder)
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = load_tokenizer(str(folder), where="hf") if has_tokenizer else None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress.tensors(f"reading {folder}", size) as seen:
        engine = model.engine(mesh, model.dtype, folder, seen)
    with staged(out) as work:
        with progress.waiting("writing the checkpoint"):
            hub = "" if Path(hf).exists() else hf
            _write_checkpoint(work, model.role, engine, hub, tokenizer)
        load_into(engine, str(work), model.role)
        with progress.tensors("comparing tensors", total_bytes(engine)) as seen:
            different = differing(folder, engine.export(), mesh, seen=seen)
        refuse(folder, [("not what was read", different)])
        progress.line("all tensors of the checkpoint equal the folder's, bit for bit")
        release(engine)
        progress.line(model.compared(mesh, work, folder, progress) if verify else NOT_COMPARED)


def _model_of(folder: Path) -> Model:
    """Judge role and dtype by content: a language model, one label, or one label beside a group
    head."""
    architecture = architecture_from_hf(folder)
    config = json.loads((folder / "config.json").read_text())
    role, group = "actor", None
    if is_classifier(config):
        if num_labels(config) != 1:
            raise UserError(
                f"a classifier with num_labels {num_labels(config)}; reward models and critics have"
                " one",
                where=str(folder / "config.json"),
                fix="train it with num_labels=1",
            )
        role = "reward"
        if (folder / GROUP_HEAD).is_file():
            role, group = "critic", _saved_group(folder)
    return Model(role, architecture, OUR_DTYPES[stored_dtype(open_weights(folder))], group)


def _saved_group(folder: Path) -> HeadSpec:
    with safe_open(folder / GROUP_HEAD, framework="pt") as saved:
        groups = saved.get_slice("weight").get_shape()[0]
        return HeadSpec(groups, saved.metadata()["input"], detach_trunk=True)


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
    verify: bool,
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write one role of a checkpoint as a Hugging Face folder, in a world of one, from any layout.

    role: "" is the policy, or the only role. Raises UserError (then `out` does not exist), Mismatch
    (then OUT.mismatch does).
    """
    refuse_existing(out)
    meta = read_meta(path)
    role = role or ("actor" if "actor" in meta.roles else next(iter(meta.roles)))
    if role not in meta.roles:
        raise UserError(
            f"the checkpoint has no {role!r}",
            where=str(path),
            fix=f"role={' or role='.join(meta.roles)}",
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
    model = Model(role, about.architecture, about.dtype, about.group)
    home = path / "tokenizer"
    tokenizer = load_tokenizer(str(home), where=str(path)) if home.is_dir() else None
    with progress.waiting(f"reading {path}"):
        engine = model.engine(mesh, model.dtype, path)
    with staged(out) as work:
        padding = write_folder(work, engine, tokenizer, meta, progress, shard_bytes)
        checks = check_folder(work, engine, progress)
        release(engine)
        checks.append(model.compared(mesh, path, work, progress) if verify else NOT_COMPARED)
        for line in checks:
            progress.line(line)
        card = model_card(role, about, meta, padding=padding, checks=checks)
        (work / "README.md").write_text(card, encoding="utf-8")
