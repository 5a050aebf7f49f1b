"""Rows of one file: JSON Lines, JSON, CSV, Parquet or Arrow, compressed too."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from gipo_megatron.errors import UserError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
Columns = dict[str, Any]
_MEDIA = "struct<bytes: binary, path: string>"  # the storage of all media of datasets


def suffix_of(file: Path) -> str:
    """Return the suffix, without that of the compression."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def read_file(file: Path) -> Iterator[tuple[int, Columns]]:
    """Yield (line or row number, columns). Raises UserError for a line that cannot be read."""
    return _READERS[suffix_of(file)](file)


def is_one_object(file: Path) -> bool:
    """Check for a .json file that is one object: it describes data, and holds no rows."""
    try:
        return isinstance(json.loads(_text(file)), dict)
    except (ValueError, OSError):  # the reader reports it
        return False


def _open(file: Path) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]  # slow to import

    compression = COMPRESSED.get(file.suffix.lower())
    content = pyarrow.input_stream(str(file), compression=compression)
    return cast(IO[bytes], io.BufferedReader(content))


def _text(file: Path) -> str:
    with _open(file) as content:
        return content.read().decode("utf-8-sig")


def _read_jsonl(file: Path) -> Iterator[tuple[int, Columns]]:
    # binary: only \n ends a line, not Unicode's other separators
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                text = line.decode("utf-8-sig")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(
                    f"not UTF-8: {error.reason} at byte {error.start}",
                    where=where,
                    fix="save the file as UTF-8",
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"unreadable JSON: {error.msg} at character {error.pos}",
                    where=where,
                    fix="one JSON object a line, or in a .json file a list of objects",
                ) from error
            if text.strip():
                yield number, _object(row, where)


def _read_json(file: Path) -> Iterator[tuple[int, Columns]]:
    """Yield the rows of a list of objects, numbered by place, or those of JSON Lines under the name
    .json."""
    with _open(file) as content:
        start = content.read(64).removeprefix(b"\xef\xbb\xbf")
    if start.strip() and not start.lstrip().startswith(b"["):
        yield from _read_jsonl(file)
        return
    try:
        rows = json.loads(_text(file).strip() or "[]")
    except json.JSONDecodeError as error:
        raise UserError(
            f"unreadable JSON: {error.msg}", where=f"{file} line {error.lineno}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield number, _object(row, f"{file} row {number}")


def _object(row: Any, where: str) -> Columns:
    if not isinstance(row, dict):
        kind = type(row).__name__
        fix = 'rows are objects: {"prompt": …}'
        raise UserError(f"a JSON {kind}, not an object", where=where, fix=fix)
    return row


def _read_csv(file: Path) -> Iterator[tuple[int, Columns]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    with _open(file) as raw:
        reader = csv.DictReader(
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True
        )
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"a row of another length than the header ({len(reader.fieldnames or [])}"
                    " columns)",
                    where=f"{file} line {reader.line_num}",
                )
            yield reader.line_num, row


def _read_parquet(file: Path) -> Iterator[tuple[int, Columns]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _open(file) as raw:
        content = io.BytesIO(raw.read()) if file.suffix.lower() in COMPRESSED else str(file)
    batches = pyarrow.parquet.ParquetFile(content).iter_batches()
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _read_arrow(file: Path) -> Iterator[tuple[int, Columns]]:
    import datasets  # slow to import

    return rows_of(datasets.Dataset.from_file(str(file)))


def rows_of(rows: Any) -> Iterator[tuple[int, Columns]]:
    """Yield the rows of a `datasets.Dataset`, without its pictures, sounds and other media.

    A row of media can name any file or address, which datasets would open.
    """
    media = [name for name, feature in rows.features.items() if _is_media(feature)]
    return enumerate(map(dict, rows.remove_columns(media)), 1)


def _is_media(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    if (inner := getattr(feature, "feature", None)) is not None:  # of a list
        return _is_media(inner)
    return str(getattr(feature, "pa_type", "")) == _MEDIA


_READERS: dict[str, Any] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(_READERS)
