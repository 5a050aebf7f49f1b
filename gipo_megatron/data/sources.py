"""Where rows come from: files and folders (JSON Lines, JSON, CSV, Parquet, gzipped too), or the hub
through `datasets`."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from gipo_megatron.data import tldr
from gipo_megatron.data.hub import is_hub_name, offline, reach_hub
from gipo_megatron.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
Row = tuple[str, dict[str, Any]]  # where it stands (file and line), its columns


@dataclass(frozen=True)
class Part:
    """The rows of one source."""

    source: str
    rows: Iterable[Row]
    split: bool  # these are the split's rows already; False: all rows, to be split by a hash


def open_parts(path: str, names: list[str], split: str, format: str) -> list[Part]:
    """One part a source, sorted by name; split = train | test | all; format = data.format.

    Without names, every source is read; of OpenAI's layout, which keeps `comparisons` and `posts`
    apart, the one that serves the format. Raises UserError: nothing at `path`, an unknown source
    name, no data files, the hub not reached.
    """
    if not path:
        raise UserError(
            "data.path is empty", where="data.path", fix="give a file, a folder or a hub name"
        )
    root = Path(path).expanduser()
    if root.is_file():
        if _suffix(root) not in SUFFIXES:
            raise UserError(
                f"{root.name}: not a kind of file this can read",
                where=path,
                fix=f"use {' '.join(SUFFIXES)} (also .gz)",
            )
        return [Part(root.name.split(".")[0], read_files([root]), split=False)]
    if root.is_dir():
        return _folder_parts(root, names, split, format)
    if not is_hub_name(path) or _suffix(root) in SUFFIXES:
        raise UserError(
            f"nothing at {path!r}",
            where="data.path",
            fix="give an existing file or folder, or a hub name (owner/name)",
        )
    return _hub_parts(path, names, split, format)


def _folder_parts(root: Path, names: list[str], split: str, format: str) -> list[Part]:
    folders = {
        folder.name: folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name != "data" and data_files(folder)
    }
    if data_files(root):
        folders[root.resolve().name] = root
    if not folders:
        raise UserError(
            f"no data files in {root}",
            where="data.path",
            fix=f"files must end in {' '.join(SUFFIXES)} (also .gz)",
        )
    names = names or _parts_for(format, folders)
    unknown = [name for name in names if name not in folders]
    if unknown:
        raise UserError(
            f"no source {', '.join(unknown)} in {root}",
            where="data.source",
            fix=f"there are {', '.join(sorted(folders))}",
        )
    return [_folder_part(name, folders[name], split) for name in sorted(names or folders)]


def _parts_for(format: str, available: Collection[str]) -> list[str]:
    """What to read where the user named no source: the part that serves the format; []: all. Raises
    UserError when it is not there."""
    part = tldr.part_for(format, available)
    if part is not None and part not in available:
        raise UserError(
            f"data.format {format} reads OpenAI's {part}; there are only"
            f" {', '.join(sorted(available))}",
            where="data.path",
            fix="data.format=preference reads comparisons for every stage",
        )
    return [part] if part is not None else []


def _folder_part(name: str, folder: Path, split: str) -> Part:
    files = data_files(folder)
    by_split = {
        key: [file for file in files if _named(file, words)] for key, words in SPLITS.items()
    }
    if split == "all" or not any(by_split.values()):
        return Part(name, read_files(files), split=False)
    if by_split["train"]:
        tests = by_split["test"]
        return Part(
            name,
            read_files(by_split["train"] if split == "train" or not tests else tests),
            split=bool(tests),
        )
    if split == "test":
        return Part(name, read_files(by_split["test"]), split=True)
    raise UserError(
        f"{folder} has no train file, only {', '.join(file.name for file in by_split['test'])}",
        where="data.path",
    )


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder and of its `data` sub-folder (as the hub lays them out),
    sorted."""
    inner = folder / "data"
    places = [folder, *([inner] if inner.is_dir() else [])]
    return sorted(
        file
        for place in places
        for file in place.iterdir()
        if file.is_file() and _suffix(file) in SUFFIXES
    )


def _named(file: Path, words: tuple[str, ...]) -> bool:
    stem = file.name.lower()
    return any(
        stem.startswith(word) and not stem[len(word) : len(word) + 1].isalpha() for word in words
    )


def _suffix(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix


# -------------------------------------------------------------------------------------------- files


def read_files(files: list[Path]) -> Iterator[Row]:
    """The rows of each file in turn. Raises UserError for an empty file and for what cannot be
    read, naming file and line."""
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    for file in files:
        count = 0
        try:
            for number, row in readers[_suffix(file)](file):
                count += 1
                yield f"{file} line {number}", row
        except (OSError, EOFError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
            raise UserError(
                f"cannot read the file: {error}", where=f"{file}, after row {count}"
            ) from error
        if not count:
            raise UserError(
                "the file holds no rows", where=str(file), fix="remove it, or make it again"
            )


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix == ".gz" else open(file, "rb")


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # binary: lines end at \n only, never at the other separators Unicode knows
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(line, f"{file} line {number}")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason} at byte {error.start}", where=where) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"unreadable JSON: {error.msg} at character {error.pos}",
            where=where,
            fix="one JSON object a line",
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"a JSON {type(row).__name__}, not an object",
            where=where,
            fix='one object a line: {"prompt": …}',
        )
    return row


def _read_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects, or JSON Lines by another name; the "line" of a list's row is its place in
    the list."""
    with _open(file) as content:
        text = content.read()
    if not text.lstrip().startswith(b"["):
        yield from _read_jsonl(file)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"unreadable JSON: {error.msg}", where=f"{file} line {error.lineno}"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"a JSON {type(row).__name__}, not an object", where=f"{file} row {number}"
            )
        yield number, row


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(file) as raw:
        batches = pyarrow.parquet.ParquetFile(raw if file.suffix == ".gz" else file).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


# ------------------------------------------------------------------------------------------ the hub


def _hub_parts(name: str, sources: list[str], split: str, format: str) -> list[Part]:
    fix = (
        "download it once and give the folder: data.path=FOLDER (with train*.jsonl, test*.parquet,"
        " … or one sub-folder a source)"
    )
    if not offline():
        reach_hub(name, "data.path", fix)
    try:
        configurations = datasets.get_dataset_config_names(name)
        sources = sources or _parts_for(format, configurations)
        loaded = {
            source: (
                datasets.load_dataset(name, source)
                if source in configurations
                else datasets.load_dataset(name, data_dir=source)
            )
            for source in sorted(sources)
        } or {name.split("/")[-1]: datasets.load_dataset(name)}
    # RuntimeError: a set that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {name!r} from the hub: {str(error).splitlines()[0]}",
            where="data.path",
            fix=fix,
        ) from error
    return [_hub_part(source, splits, split) for source, splits in loaded.items()]


def _hub_part(source: str, splits: Any, split: str) -> Part:
    """`splits`: {split name: rows}, as `datasets.load_dataset` gives it."""
    tests = [key for word in SPLITS["test"] for key in splits if key.startswith(word)]
    if split == "all":
        return Part(source, _number(source, splits, list(splits)), split=False)
    wanted = tests[:1] if split == "test" and tests else ["train"]
    if wanted[0] not in splits:
        raise UserError(f"{source} has no train split, only {', '.join(splits)}", where="data.path")
    return Part(source, _number(source, splits, wanted), split=bool(tests))


def _number(source: str, splits: Any, names: list[str]) -> Iterator[Row]:
    for name in names:
        for number, row in enumerate(splits[name], 1):
            yield f"{source} {name} row {number}", dict(row)
