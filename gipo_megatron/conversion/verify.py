"""Checks of a Hugging Face folder against transformers' own model, with PEFT's adapters on it where
the folder has these: names, shapes, dtypes, bytes and outputs."""

from __future__ import annotations

import gc
import math
import warnings
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from gipo_megatron.errors import library_errors
from gipo_megatron.files import read_object
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.roles import outputs
from gipo_megatron.web import at
from gipo_megatron.weights.checkpoints import weights_kind
from gipo_megatron.weights.hf_config import is_classifier
from gipo_megatron.weights.hf_files import BYTES, INDEX, Weights, open_weights
from gipo_megatron.weights.hf_values import FIX
from gipo_megatron.weights.sources import adapted_model

# of the largest output, in fp32: rounding grows with depth; a wrong weight or rotary base is off by
# far more than this
TOLERANCE = 1e-4
ROWS, TOKENS = 2, 24


def check_structure(folder: Path, dtype: str) -> str:
    """Return one line on the checks that passed.

    Raises Mismatch naming the tensors that differ from transformers' own model of this config.json.
    """
    weights = open_weights(folder)
    shapes = weights.shapes
    # tied ones once, as they are saved
    expected = {name: tuple(p.shape) for name, p in _empty_model(folder).named_parameters()}
    wrong = [name for name in expected if shapes.get(name, expected[name]) != expected[name]]
    problems = [
        ("missing", [name for name in expected if name not in shapes]),
        ("not in transformers' model", [name for name in shapes if name not in expected]),
        ("wrong shape", wrong),
        (f"not {dtype}", [name for name, found in weights.dtypes.items() if found != dtype]),
    ]
    refuse(folder, problems)
    size = sum(math.prod(shape) for shape in expected.values()) * BYTES[dtype]
    written = sum(math.prod(shape) * BYTES[weights.dtypes[name]] for name, shape in shapes.items())
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
    """Raise Mismatch naming the tensors of every list that is not empty."""
    lines = []
    for title, names in problems:
        if names:
            more = f" … and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"\n  {title} ({len(names)}): {', '.join(names[:8])}{more}")
    if lines:
        raise Mismatch(
            "the converted model differs" + "".join(lines),
            where=str(folder),
            fix="please report this: it is a defect of the conversion",
        )


def _stated_size(folder: Path, otherwise: int) -> int:
    index = folder / INDEX
    if not index.is_file():
        return otherwise
    size = at(read_object(index, FIX), "metadata", "total_size")
    return size if isinstance(size, int) else otherwise


def _refused(folder: Path) -> AbstractContextManager[None]:
    """Return a context in which every exception of transformers becomes an error that names the
    folder."""
    return library_errors(
        "transformers cannot load this model",
        where=str(folder),
        fix="correct config.json, or convert without this check: verify=false",
    )


def _empty_model(folder: Path) -> PreTrainedModel:
    with _refused(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto = AutoModelForCausalLM
        if is_classifier({"architectures": config.architectures}):
            auto = AutoModelForSequenceClassification
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)


def stored_dtype(*folders: Weights) -> str:
    """Return the one dtype of all tensors; float32 for a mixture, which loses nothing.

    Raises Mismatch for quantised tensors.
    """
    found = {dtype for weights in folders for dtype in weights.dtypes.values()}
    if unknown := sorted(found - set(BYTES)):
        raise Mismatch(
            f"tensors of dtype {', '.join(unknown)}: quantised weights are not converted",
            where=folders[0].where,
        )
    return found.pop() if len(found) == 1 else "float32"


# ------------------------------------------------------------------------------------------ outputs


def random_rows(vocab_size: int, forbidden: int | None) -> tuple[Tensor, Tensor]:
    """Return token ids [2, 24] and lengths [2], the first row shorter; the padding id occurs in the
    padding alone."""
    ids = torch.randint(0, vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    if forbidden is not None:
        ids[ids == forbidden] = (forbidden + 1) % vocab_size
    return ids, torch.tensor([TOKENS - 7, TOKENS])


@torch.no_grad()
def output_difference(folder: Path, engine: Engine) -> tuple[float, float]:
    """Return (largest difference, largest output) of `engine`, in fp32, and transformers' or PEFT's
    model of `folder`, on random tokens.

    Compares logits [2, 24, V] of a language model at real tokens; scores [2] of a model with a
    head, padded where config.json has a padding id. Empties `engine`: the two models are never in
    memory together.
    """
    home = adapted_model(folder) if weights_kind(folder) == "adapter" else folder
    with _refused(home):
        config = AutoConfig.from_pretrained(home, trust_remote_code=False)
    ids, lengths = random_rows(engine.architecture.vocab_size, config.pad_token_id)
    ours = outputs(engine, ids)
    release(engine)
    with _refused(folder):
        model = _load(home, engine.head)
        if home != folder:
            model = _adapted(model, folder)
    real = torch.arange(TOKENS) < lengths[:, None]
    if engine.head is None:
        theirs = model(ids).logits[real]
        ours = ours[real]
    else:
        ours = ours[torch.arange(ROWS), lengths - 1, 0]
        pad = config.pad_token_id
        scores = [_score(model, ids[i : i + 1], int(lengths[i]), pad) for i in range(ROWS)]
        theirs = torch.cat(scores)
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _adapted(model: PreTrainedModel, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports, and of other packages' new names
        return import_module("peft").PeftModel.from_pretrained(model, str(folder)).eval()


def _load(folder: Path, head: str | None) -> PreTrainedModel:
    """Load transformers' model in fp32, without its progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        auto, labels = AutoModelForCausalLM, {}
        if head is not None:  # PEFT's adapters bring one, on a model without
            auto, labels = AutoModelForSequenceClassification, {"num_labels": 1}
        model = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **labels)
        return model.eval()
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _score(model: PreTrainedModel, ids: Tensor, length: int, pad: int | None) -> Tensor:
    """Return [1], the score of a row as a user would pass it, padded where that is possible."""
    if pad is None:
        return model(ids[:, :length]).logits[:, 0]
    padded = torch.where(torch.arange(TOKENS) < length, ids, pad)
    return model(padded, attention_mask=(torch.arange(TOKENS) < length).long()[None]).logits[:, 0]


def release(engine: Engine) -> None:
    """Free a model's memory; the engine cannot be used afterwards."""
    for chunk in engine.chunks:
        chunk.to("meta")
    gc.collect()


def check_outputs(folder: Path, engine: Engine) -> str:
    """Return one line on the agreement. Raises Mismatch where the two models' outputs differ."""
    adapters = weights_kind(folder) == "adapter"
    if adapters and find_spec("peft") is None:
        return "NOT checked (peft is not installed): outputs against PEFT's model"
    difference, largest = output_difference(folder, engine)
    theirs = "PEFT's" if adapters else "transformers'"
    what = "scores" if engine.head is not None else "logits"
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise Mismatch(
            f"{what} differ by {difference:.3g} from {theirs} (largest {largest:.3g}), though"
            " all tensors agree",
            where=str(folder),
            fix="config.json does not describe these weights; please report this",
        )
    return (
        f"{what} on random tokens within {difference:.2g} of {theirs} (largest {largest:.3g}),"
        " in fp32"
    )
