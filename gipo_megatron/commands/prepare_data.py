"""Check preference, prompt or SFT data before a run, and write them cleaned.

gipo prepare-data data.path=FOLDER data.format=preference [tokenizer=bytes] [out=DIR]
gipo prepare-data planted out=DIR [data.planted.prompts=600 …]

Keys are those of a recipe's `data` section. Prints what was kept and dropped and why, token
lengths, and one row. With out=DIR it writes DIR/<source>/<train|test>.jsonl, which a recipe reads
with the same data.format (planted: one folder for each format).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import Example
from gipo_megatron.data.planted import write_planted
from gipo_megatron.data.splits import is_hidden, split_of
from gipo_megatron.data.templates import choose
from gipo_megatron.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.files import expand, write_jsonl
from gipo_megatron.recipe.files import parse_arguments
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.source import Block
from gipo_megatron.recipe.validate import Validation
from gipo_megatron.screen import shown

QUANTILES = (0.5, 0.9, 0.99, 1.0)
NAMES = {"preference": ("chosen", "rejected"), "sft": ("response",), "prompt": ()}
SAMPLE = 2000  # rows whose lengths are measured


def read_arguments(arguments: Sequence[str]) -> tuple[DataConfig, str, Path | None]:
    """Return the data section, tokenizer and out. Raises UserError for unknown keys
    and values out of range."""
    keys = {"tokenizer": BYTES, "out": ""}
    block = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument == "planted":
            block.append("data.format=planted")
        elif key.startswith("data.") and equals:
            block.append(argument)
        elif key in keys and equals:
            keys[key] = expand(value)
        else:
            raise UserError(
                f"unknown argument {argument!r}",
                where="command line",
                fix="give data.KEY=VALUE, tokenizer=…, out=DIR, or planted",
            )
    validation = Validation()
    tree = parse_arguments(["recipe=data", *block]).overrides.at("data") or Block({}, "")
    assert isinstance(tree, Block)
    _, values = validation.block(tree, DataConfig, ("data",))
    if validation.problems:
        raise RecipeErrors("command line", validation.problems)
    config = DataConfig(**values)
    return config, keys["tokenizer"], Path(keys["out"]) if keys["out"] else None


def lengths(data: Dataset, encoder: Encoder, tokenizer: Tokenizer) -> list[str]:
    """Return quantiles of prompt and response lengths in tokens, as lines of text, measured on up
    to SAMPLE rows spread evenly."""
    rows = list(range(0, len(data), -(-len(data) // SAMPLE)))
    prompts = [len(encoder.prompt(data.rows[row], row)[0]) for row in rows]
    responses = [
        len(encoded.tokens) - encoded.prompt_length
        for row in rows
        for encoded in (
            encoder.sequence(data.rows[row], row, i) for i in range(len(data.rows[row].responses))
        )
    ]
    lines = []
    for name, counts in (("prompt", prompts), ("response", responses)):
        if counts:
            at = (
                torch.tensor(counts, dtype=torch.float64)
                .quantile(torch.tensor(QUANTILES, dtype=torch.float64))
                .tolist()
            )
            lines.append(
                f"{name} tokens: "
                + "  ".join(
                    f"{'max' if q == 1 else f'{q:.0%}'} {value:.0f}"
                    for q, value in zip(QUANTILES, at, strict=True)
                )
            )
    return lines + encoder.lines()


def show(example: Example, encoder: Encoder) -> list[str]:
    """Return one row as the model reads it, cut to a few hundred characters."""
    _, prompt = encoder.prompt(example, 0)
    names = {0: (), 1: ("response",), 2: ("chosen", "rejected")}[len(example.responses)]
    parts = [("prompt", prompt), *zip(names, example.responses, strict=True)]
    return [
        f"  {name}: {text if len(text) <= 300 else text[:140] + ' … ' + text[-140:]!r}"
        for name, text in parts
    ]


def row_of(example: Example, kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the example as columns that the loader reads back as the same example."""
    names = NAMES[kind]
    if example.style == "messages":
        prompt: Any = [{"role": turn.role, "content": turn.text} for turn in example.prompt]
        answers: dict[str, Any] = {
            n: [{"role": "assistant", "content": text}]
            for n, text in zip(names, example.responses, strict=True)
        }
    else:
        prompt = choose("plain", example.style, tokenizer).prompt(example.prompt)
        answers = dict(zip(names, example.responses, strict=True))
    return {"prompt": prompt, **answers, **example.extras}


def write(data: Dataset, kind: str, split: str, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Write one file a source; each is complete or absent."""
    rows: dict[Path, list[dict[str, Any]]] = {}
    for example in data.rows:
        # the name of a split would mark the rows, and a hidden folder is not read
        name = quote(example.source, safe=" ")
        name = "rows" if split_of([name]) or is_hidden(name) else name
        row = row_of(example, kind, tokenizer)
        rows.setdefault(out / name / f"{split}.jsonl", []).append(row)
    for file, its in rows.items():
        write_jsonl(file, its)
    return list(rows)


def main(argv: Sequence[str]) -> int:
    config, spec, out = read_arguments(argv)
    tokenizer = load_tokenizer(spec, "tokenizer")
    kind = "preference" if config.format == "planted" else config.format
    for split in ("train", "test"):
        data = load_data(config, tokenizer, split, 0, kind, needed=split == "train")
        encoder = Encoder(config, tokenizer)
        print(shown("\n  ".join([f"{split}:", *data.report])))
        if not data.rows:
            continue
        lines = (*lengths(data, encoder, tokenizer), "first row:", *show(data.rows[0], encoder))
        print(*(f"  {line}" for line in lines), sep="\n")
        if out is not None and config.format != "planted":
            print(*(f"wrote {file}" for file in write(data, kind, split, tokenizer, out)), sep="\n")
    if out is not None and config.format == "planted":
        print(*(f"wrote {file}" for file in write_planted(config.planted, out)), sep="\n")
    return 0
