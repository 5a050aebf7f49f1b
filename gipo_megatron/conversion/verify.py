"""Whether a Hugging Face folder is what it claims: names, shapes, dtypes and bytes as transformers
has them, and the same outputs."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from gipo_megatron.conversion.staging import Mismatch
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.roles import outputs
from gipo_megatron.weights.hf_files import BYTES, Weights, open_weights

# of the largest output, in fp32: rounding grows with depth; a wrong weight or rotary base is off by
# far more than this
TOLERANCE = 1e-4
ROWS, TOKENS = 2, 24


def check_structure(folder: Path, dtype: str) -> str:
    """One line on what agrees. Raises Mismatch naming the tensors that transformers' own model of
    this config.json has otherwise."""
    weights = open_weights(folder)
    # tied ones once, as they are saved
    expected = {name: tuple(p.shape) for name, p in _empty_model(folder).named_parameters()}
    problems = [
        ("missing", [name for name in expected if name not in weights.shapes]),
        ("not in transformers' model", [name for name in weights.shapes if name not in expected]),
        (
            "wrong shape",
            [
                n
                for n, shape in expected.items()
                if n in weights.shapes and weights.shapes[n] != shape
            ],
        ),
        (f"not {dtype}", [name for name, found in weights.dtypes.items() if found != dtype]),
    ]
    refuse(folder, problems)
    size = sum(math.prod(shape) for shape in expected.values()) * BYTES[dtype]
    written = sum(
        math.prod(shape) * BYTES[weights.dtypes[name]] for name, shape in weights.shapes.items()
    )
    if written != size or (stated := _stated_size(folder, size)) != size:
        raise Mismatch(
            f"{written} bytes of tensors, transformers' model has {size}; the index states"
            f" {stated}",
            where=str(folder),
        )
    return (
        f"{len(expected)} tensors: names, shapes, {dtype}, {size:,} bytes, as transformers' own"
        " model has them"
    )


def refuse(folder: Path, problems: list[tuple[str, list[str]]]) -> None:
    """Mismatch naming the tensors of every list that is not empty."""
    lines = []
    for title, names in problems:
        if names:
            more = f" … and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:8])}{more}")
    if lines:
        fix = "please report this: a conversion that does not verify is a defect"
        raise Mismatch(
            "the conversion does not verify\n" + "\n".join(lines), where=str(folder), fix=fix
        )


def _stated_size(folder: Path, otherwise: int) -> int:
    index = folder / "model.safetensors.index.json"
    return (
        int(json.loads(index.read_text())["metadata"]["total_size"])
        if index.is_file()
        else otherwise
    )


def _empty_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return _auto_class(config.architectures).from_config(config, dtype=torch.float32)


def _auto_class(
    architectures: list[str],
) -> type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]:
    return (
        AutoModelForSequenceClassification
        if architectures[0].endswith("ForSequenceClassification")
        else AutoModelForCausalLM
    )


def stored_dtype(weights: Weights) -> str:
    """The one dtype of a folder's tensors; float32 for a mixture, which loses nothing. Raises
    Mismatch for what is quantised."""
    found = set(weights.dtypes.values())
    if unknown := sorted(found - set(BYTES)):
        raise Mismatch(
            f"tensors of dtype {', '.join(unknown)}: quantised weights are not converted",
            where=weights.where,
        )
    return found.pop() if len(found) == 1 else "float32"


# ------------------------------------------------------------------------------------------ outputs


def random_rows(vocab_size: int, forbidden: int | None) -> tuple[Tensor, Tensor]:
    """Token ids [2, 24] and lengths [2], the first row shorter; the padding id nowhere but in the
    padding."""
    ids = torch.randint(0, vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    if forbidden is not None:
        ids[ids == forbidden] = (forbidden + 1) % vocab_size
    return ids, torch.tensor([TOKENS - 7, TOKENS])


@torch.no_grad()
def output_difference(folder: Path, engine: Engine) -> tuple[float, float]:
    """(largest difference, largest output) of an fp32 model of ours and transformers' of `folder`,
    on random tokens.

    Logits [2, 24, V] of a language model at real tokens; scores [2] of a model with a head, padded
    where config.json names a padding id. Empties `engine`: the two models need not be in memory
    together.
    """
    config = AutoConfig.from_pretrained(folder)
    ids, lengths = random_rows(engine.architecture.vocab_size, config.pad_token_id)
    ours = outputs(engine, ids)
    release(engine)
    model = _load(folder, config.architectures)
    real = torch.arange(TOKENS) < lengths[:, None]
    if engine.head is None:
        theirs = model(ids).logits[real]
        ours = ours[real]
    else:
        ours = ours[torch.arange(ROWS), lengths - 1, 0]
        theirs = torch.cat(
            [
                _score(model, ids[i : i + 1], int(lengths[i]), config.pad_token_id)
                for i in range(ROWS)
            ]
        )
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _load(folder: Path, architectures: list[str]) -> PreTrainedModel:
    """transformers' model in fp32, without its progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return _auto_class(architectures).from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _score(model: PreTrainedModel, ids: Tensor, length: int, pad: int | None) -> Tensor:
    """[1]: a row as a user would pass it, padded where padding is possible."""
    if pad is None:
        return model(ids[:, :length]).logits[:, 0]
    padded = torch.where(torch.arange(TOKENS) < length, ids, pad)
    return model(padded, attention_mask=(torch.arange(TOKENS) < length).long()[None]).logits[:, 0]


def release(engine: Engine) -> None:
    """Gives a model's memory back; the engine is of no use afterwards."""
    for chunk in engine.chunks:
        chunk.to("meta")
    gc.collect()


def check_outputs(folder: Path, engine: Engine) -> str:
    """One line on what agrees. Raises Mismatch where the two models do not say the same."""
    difference, largest = output_difference(folder, engine)
    what = "scores" if engine.head is not None else "logits"
    if not difference <= TOLERANCE * max(largest, 1.0):
        text = (
            f"{what} differ by {difference:.3g} from transformers' (largest {largest:.3g}), though"
            " all tensors agree"
        )
        raise Mismatch(
            text,
            where=str(folder),
            fix="config.json describes another model than these weights are of; please report this",
        )
    return (
        f"{what} on random tokens within {difference:.2g} of transformers' (largest {largest:.3g}),"
        " in fp32"
    )
