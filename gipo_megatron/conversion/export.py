"""A model as a Hugging Face folder, or its adapters as PEFT's: weights, configuration, tokenizer,
and what is checked of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gipo_megatron.conversion.card import model_card
from gipo_megatron.conversion.staging import staged
from gipo_megatron.conversion.verify import check_structure, refuse
from gipo_megatron.data.templates import as_chat_template
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.megatron.checkpoint import describe
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import (
    GROUP_HEAD,
    differing,
    same_group_head,
    save_group_head,
    save_hf,
)
from gipo_megatron.megatron.hf_adapters import export_adapters, save_adapters
from gipo_megatron.telemetry.console import Display
from gipo_megatron.weights import peft_config
from gipo_megatron.weights.base import BaseMeta
from gipo_megatron.weights.checkpoints import CheckpointMeta
from gipo_megatron.weights.end_tokens import GENERATION, generation_config
from gipo_megatron.weights.hf_config import config_text
from gipo_megatron.weights.hf_files import HF_DTYPES, SHARD_BYTES

NOT_COMPARED = "NOT checked (verify=false): outputs against transformers or PEFT"


def base_name(base: BaseMeta | None) -> str:
    """Return the hub name or the folder of the Hugging Face model that adapters belong to: what
    PEFT loads first. Empty for random weights and a checkpoint, which it cannot load."""
    folder = Path(base.source).absolute() if base is not None else Path()
    if base is None or not base.source or not (folder / "config.json").is_file():
        return ""
    home = folder.parent.parent.name  # of a snapshot in the hub's cache
    if folder.parent.name == "snapshots" and home.startswith("models--"):
        return home.removeprefix("models--").replace("--", "/", 1)
    return str(folder)


def tensors(engine: Engine, *, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a folder: the whole model's, or adapters' and a head's.
    Collective."""
    if not adapters:
        return engine.export()
    place = engine.chunks, engine.mesh, engine.architecture, engine.adapter
    return export_adapters(*place, head=engine.head)


def export_run(
    out: Path,
    role: str,
    engine: Engine,
    tokenizer: Tokenizer,
    meta: CheckpointMeta,
    progress: Display,
) -> None:
    """Write a run's model as a Hugging Face folder, at the run's own layout, replacing an older
    one: adapters as PEFT's, merged where PEFT cannot load their base. Collective; rank 0 writes.

    Everything is checked but the outputs, for which a whole second model would have to be in
    memory.
    """
    about = describe(engine)
    base = base_name(about.base)
    if not engine.mesh.is_main:
        _take_part(engine, base)
        return
    with staged(out) as work:
        padding = write_folder(work, engine, base, tokenizer, meta, progress)
        checks = [
            *check_folder(work, engine, base, progress),
            f"NOT checked: outputs against {'PEFT' if base else 'transformers'} (`gipo convert"
            " to-hf` compares them)",
        ]
        card = model_card(role, about, meta, base=base, padding=padding, checks=checks)
        (work / "README.md").write_text(card, encoding="utf-8")


def _take_part(engine: Engine, base: str) -> None:
    """Run the collectives of `write_folder` and `check_folder` on ranks that do not write."""
    if engine.group_head is not None:
        engine.group_head.broadcast()
    for _ in range(2):
        for _ in tensors(engine, adapters=bool(base)):
            pass


def write_folder(
    work: Path,
    engine: Engine,
    base: str,
    tokenizer: Tokenizer | None,
    meta: CheckpointMeta,
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> str | None:
    """Write weights, config.json, generation_config.json, tokenizer and group head; of adapters on
    a `base` (`base_name`) adapter_config.json alone.

    Returns the token that texts for a model with a head may be padded with, if there is one.
    """
    if engine.group_head is not None:
        engine.group_head.broadcast()
        save_group_head(work, engine.group_head)
    if base:
        config = peft_config.config_for(engine.adapter, base, engine.head)
        save_adapters(work, tensors(engine, adapters=True), engine.mesh, config)
    else:
        with progress.tensors("writing", total_bytes(engine, adapters=False)) as seen:
            save_hf(work, engine.export(), engine.mesh, shard_bytes=shard_bytes, seen=seen)
    padding = None
    if tokenizer is not None:
        if meta.template is not None and meta.style is not None:
            template = as_chat_template(meta.template, tokenizer, meta.style)
            tokenizer = tokenizer.with_chat_template(template)
        if engine.head is not None and (padding := tokenizer.scoring_pad()) is not None:
            tokenizer = tokenizer.with_padding(padding)
        tokenizer.save(work)
    if base:
        return padding
    config = _config(engine, tokenizer, padding is not None)
    (work / "config.json").write_text(config, encoding="utf-8")
    if engine.head is None and (text := _generation_config(engine, tokenizer)):
        (work / GENERATION).write_text(text, encoding="utf-8")
    return padding


def _config(engine: Engine, tokenizer: Tokenizer | None, padded: bool) -> str:
    special = {} if tokenizer is None else tokenizer.special_ids
    return config_text(
        engine.hf_files,
        engine.architecture,
        HF_DTYPES[engine.precision.dtype],
        special,
        head=engine.head,
        pad_token_id=tokenizer.pad_id if tokenizer is not None and padded else None,
    )


def _generation_config(engine: Engine, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return engine.hf_files.get(GENERATION, "")
    return generation_config(engine.hf_files, tokenizer.special_ids)


def check_folder(work: Path, engine: Engine, base: str, progress: Display) -> list[str]:
    """Read a written folder back; return one line for each check that passed. Raises Mismatch."""
    kind = {"adapters": bool(base)}
    with progress.tensors("comparing tensors", total_bytes(engine, **kind)) as seen:
        different = differing(work, tensors(engine, **kind), engine.mesh, seen=seen)
    if engine.group_head is not None and not same_group_head(work, engine.group_head):
        different.append(GROUP_HEAD)
    refuse(work, [("not what was written", different)])
    structure = [] if base else [check_structure(work, HF_DTYPES[engine.precision.dtype])]
    return [*structure, "all tensors read back, bit for bit"]


def total_bytes(engine: Engine, *, adapters: bool) -> int:
    """Return this rank's bytes of `tensors` times the ranks of a replica, for a progress bar."""
    parameters = (p for chunk in engine.chunks for p in chunk.parameters())
    mine = sum(p.nbytes for p in parameters if p.requires_grad or not adapters)
    return mine * engine.mesh.parallel.model
