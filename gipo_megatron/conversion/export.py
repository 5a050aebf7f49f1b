"""A model as a Hugging Face folder: weights, configuration, tokenizer, and what is checked of
them."""

from __future__ import annotations

from pathlib import Path

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
from gipo_megatron.telemetry.console import Display
from gipo_megatron.weights.checkpoints import CheckpointMeta
from gipo_megatron.weights.end_tokens import GENERATION, generation_config
from gipo_megatron.weights.hf_config import config_text
from gipo_megatron.weights.hf_files import HF_DTYPES, SHARD_BYTES

NOT_COMPARED = "NOT checked (verify=false): outputs against transformers"


def export_run(
    out: Path,
    role: str,
    engine: Engine,
    tokenizer: Tokenizer,
    meta: CheckpointMeta,
    progress: Display,
) -> None:
    """Write a run's model as a Hugging Face folder, at the run's own layout, replacing an older
    one. Collective; rank 0 writes.

    Everything is checked but the outputs, for which a whole second model would have to be in
    memory.
    """
    if not engine.mesh.is_main:
        _take_part(engine)
        return
    with staged(out) as work:
        padding = write_folder(work, engine, tokenizer, meta, progress)
        checks = [
            *check_folder(work, engine, progress),
            "NOT checked: outputs against transformers (`gipo convert to-hf` compares them)",
        ]
        card = model_card(role, describe(engine), meta, padding=padding, checks=checks)
        (work / "README.md").write_text(card, encoding="utf-8")


def _take_part(engine: Engine) -> None:
    """Run the collectives of `write_folder` and `check_folder` on ranks that do not write."""
    if engine.group_head is not None:
        engine.group_head.broadcast()
    for _ in range(2):
        for _ in engine.export():
            pass


def write_folder(
    work: Path,
    engine: Engine,
    tokenizer: Tokenizer | None,
    meta: CheckpointMeta,
    progress: Display,
    shard_bytes: int = SHARD_BYTES,
) -> str | None:
    """Write weights, config.json, generation_config.json, tokenizer and group head.

    Returns the token that texts for a model with a head may be padded with, if there is one.
    """
    if engine.group_head is not None:
        engine.group_head.broadcast()
        save_group_head(work, engine.group_head)
    with progress.tensors("writing", total_bytes(engine)) as seen:
        save_hf(work, engine.export(), engine.mesh, shard_bytes=shard_bytes, seen=seen)
    padding = None
    if tokenizer is not None:
        if meta.template is not None and meta.style is not None:
            template = as_chat_template(meta.template, tokenizer, meta.style)
            tokenizer = tokenizer.with_chat_template(template)
        if engine.head is not None and (padding := tokenizer.scoring_pad()) is not None:
            tokenizer = tokenizer.with_padding(padding)
        tokenizer.save(work)
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


def check_folder(work: Path, engine: Engine, progress: Display) -> list[str]:
    """Read a written folder back; return one line for each check that passed. Raises Mismatch."""
    with progress.tensors("comparing tensors", total_bytes(engine)) as seen:
        different = differing(work, engine.export(), engine.mesh, seen=seen)
    if engine.group_head is not None and not same_group_head(work, engine.group_head):
        different.append(GROUP_HEAD)
    refuse(work, [("not what was written", different)])
    return [
        check_structure(work, HF_DTYPES[engine.precision.dtype]),
        "all tensors read back, bit for bit",
    ]


def total_bytes(engine: Engine) -> int:
    """Return this rank's bytes of weights times the ranks of a replica, for a progress bar."""
    mine = sum(p.nbytes for chunk in engine.chunks for p in chunk.parameters())
    return mine * engine.mesh.parallel.model
