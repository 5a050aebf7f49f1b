"""Clean rows of one source, on one side of the split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import DUPLICATE, KINDS, SEEN, BadRow, Example, Tally
from gipo_megatron.data.schemas import Schema
from gipo_megatron.data.sources import Source
from gipo_megatron.data.splits import HELD_OUT, divide, label_of_row

HEAD_ROWS = 100  # rows that settle a file's schema


def read_rows(
    source: Source, config: DataConfig, split: str, kind: str, encoder: Encoder, tally: Tally
) -> list[Example]:
    """Return the clean rows of one source. The tally counts each reason of a drop."""
    kept: list[Example] = []
    seen: set[object] = set()
    tally.unread_files += source.unread
    found = list(_examples(source, config, split, tally))
    held_out = [label in HELD_OUT for _, label, _ in found]
    if not source.split and split != "all":
        labels, prompts = [label for _, label, _ in found], [row.prompt for _, _, row in found]
        held_out = divide(labels, prompts, config.held_out)
    for (where, _, example), is_test in zip(found, held_out, strict=True):
        try:
            if source.split and split == "train" and is_test:
                raise BadRow("a row that its column split marks as held out")
            if not source.split and split != "all" and is_test != (split == "test"):
                continue
            encoder.check(example)
            _once((example.prompt, example.responses), DUPLICATE, seen)
            if kind == "prompt":
                _once(example.prompt, SEEN, seen)
        except BadRow as reason:
            tally.drop(str(reason), where, example.prompt)
            continue
        tally.kept += 1
        # a prompt keeps its first response, if it has one: see `Dataset.answers`
        kept.append(replace(example, responses=example.responses[: max(KINDS[kind], 1)]))
    return kept


def _examples(
    source: Source, config: DataConfig, split: str, tally: Tally
) -> Iterator[tuple[str, str, Example]]:
    """Yield (place, label of the column `split` or "", example) of the rows that can be read. Each
    file has its own schema."""
    for part in source.parts:
        side = part.label or "train"
        if not source.split:
            side = "all rows" if split == "all" else f"{side}, divided by a hash"
        rows = iter(part.rows)
        head = list(islice(rows, HEAD_ROWS))
        schema = Schema(config.format, config.columns, [row for _, row in head], part.place)
        tally.unread_columns |= dict.fromkeys(schema.unread)
        for where, row in chain(head, rows):
            tally.files[part.place, side] += 1
            try:
                yield where, label_of_row(row), schema.read(row, source.name, tally, where)
            except BadRow as reason:
                tally.drop(str(reason), where, row)


def _once(key: object, reason: str, seen: set[object]) -> None:
    if key in seen:
        raise BadRow(reason)
    seen.add(key)
