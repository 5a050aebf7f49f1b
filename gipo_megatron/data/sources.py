"""Readers of rows: files and folders (JSON Lines, JSON, CSV, Parquet, gzipped too), or the hub
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
READABLE = f"{' '.join(SUFFIXES)} (also .gz)"
Row = tuple[str, dict[str, Any]]  # its place (file and line), its columns


@dataclass(frozen=True)
class Source:
    """The rows of one source."""

    name: str
    rows: Iterable[Row]
    split: bool  # True: the rows of the split alone; False: all rows, to be split by a hash


def open_sources(path: str, names: list[str], split: str, format: str) -> list[Source]:
    """Open the sources `names` (by default all), sorted by name; split = train | test | all; format
    = data.format.

    OpenAI's layout keeps `comparisons` and `posts` apart: there the default is the one that serves
    the format. Raises UserError when nothing is at `path`, for an unknown name, for a folder
    without data files, and when the hub cannot be reached.
    """
    if not path:
        raise UserError(
            "data.path is empty", where="data.path", fix="give a file, a folder or a hub name"
        )
    root = Path(path).expanduser()
    if root.is_file():
        if _suffix(root) not in SUFFIXES:
            raise UserError(f"{root.name}: unknown kind of file", where=path, fix=f"use {READABLE}")
        return [Source(root.name.split(".")[0], read_files([root]), split=False)]
    if root.is_dir():
        return _folder_sources(root, names, split, format)
    if not is_hub_name(path) or _suffix(root) in SUFFIXES:
        raise UserError(
            f"nothing at {path!r}",
            where="data.path",
            fix="give an existing file or folder, or a hub name (owner/name)",
        )
    return _hub_sources(path, names, split, format)


def _folder_sources(root: Path, names: list[str], split: str, format: str) -> list[Source]:
    folders = {root.resolve().name: root} if data_files(root) else {}
    for folder in root.iterdir():
        if folder.is_dir() and folder.name != "data" and data_files(folder):
            folders.setdefault(folder.name, folder)
    if not folders:
        raise UserError(
            f"no data files in {root}",
            where="data.path",
            fix=f"files must end in {READABLE}",
        )
    names = names or _default_names(format, folders)
    unknown = [name for name in names if name not in folders]
    if unknown:
        raise UserError(
            f"no source {', '.join(unknown)} in {root}",
            where="data.source",
            fix=f"there are {', '.join(sorted(folders))}",
        )
    return [_folder_source(name, folders[name], split) for name in sorted(names or folders)]


def _default_names(format: str, available: Collection[str]) -> list[str]:
    """Return the sources to read where the user named none: the part that serves the format; [] is
    all. Raises UserError when that part is missing."""
    part = tldr.part_for(format, available)
    if part is not None and part not in available:
        raise UserError(
            f"data.format {format} reads OpenAI's {part}; there are only"
            f" {', '.join(sorted(available))}",
            where="data.path",
            fix="data.format=preference reads comparisons for every stage",
        )
    return [part] if part is not None else []


def _folder_source(name: str, folder: Path, split: str) -> Source:
    files = data_files(folder)
    train, test = ([file for file in files if _named(file, SPLITS[key])] for key in SPLITS)
    if split == "all" or not (train or test):
        return Source(name, read_files(files), split=False)
    if split == "test" and test:
        return Source(name, read_files(test), split=True)
    if not train:
        raise UserError(
            f"{folder} has no train file, only {', '.join(file.name for file in test)}",
            where="data.path",
        )
    return Source(name, read_files(train), split=bool(test))


def data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder and of its `data` sub-folder (the hub's layout), sorted."""
    files = [*folder.iterdir()]
    if (folder / "data").is_dir():
        files += (folder / "data").iterdir()
    return sorted(file for file in files if file.is_file() and _suffix(file) in SUFFIXES)


def _named(file: Path, words: tuple[str, ...]) -> bool:
    """Check for a name like train.jsonl, test-00000.parquet, but not trainer.jsonl."""
    stem = file.name.lower()
    return any(
        stem.startswith(word) and not stem.removeprefix(word)[:1].isalpha() for word in words
    )


def _suffix(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix


# -------------------------------------------------------------------------------------------- files


def read_files(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of each file in turn. Raises UserError for an empty or unreadable file, naming
    file and line."""
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
    # binary: only \n ends a line, not Unicode's other separators
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"not UTF-8: {error.reason} at byte {error.start}", where=where
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"unreadable JSON: {error.msg} at character {error.pos}",
                    where=where,
                    fix="one JSON object a line",
                ) from error
            yield number, _object(row, where)


def _read_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a list of objects, numbered by place, or those of JSON Lines under the name
    .json."""
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
        yield number, _object(row, f"{file} row {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = type(row).__name__
        fix = 'rows are objects: {"prompt": …}'
        raise UserError(f"a JSON {kind}, not an object", where=where, fix=fix)
    return row


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


def _hub_sources(path: str, names: list[str], split: str, format: str) -> list[Source]:
    fix = (
        "download it once and give the folder: data.path=FOLDER (with train*.jsonl, test*.parquet,"
        " … or one sub-folder a source)"
    )
    if not offline():
        reach_hub(path, "data.path", fix)
    try:
        configurations = datasets.get_dataset_config_names(path)
        names = names or _default_names(format, configurations)
        loaded = {name: _load(path, name, configurations) for name in sorted(names)}
        if not loaded:
            loaded = {path.split("/")[-1]: datasets.load_dataset(path)}
    # RuntimeError: a data set that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {path!r} from the hub: {str(error).splitlines()[0]}",
            where="data.path",
            fix=fix,
        ) from error
    return [_hub_source(name, splits, split) for name, splits in loaded.items()]


def _load(path: str, name: str, configurations: list[str]) -> Any:
    """Load the configuration, or else the sub-folder, `name`."""
    if name in configurations:
        return datasets.load_dataset(path, name)
    return datasets.load_dataset(path, data_dir=name)


def _hub_source(name: str, splits: Any, split: str) -> Source:
    """`splits`: {split name: rows}, from `datasets.load_dataset`."""
    tests = [key for word in SPLITS["test"] for key in splits if key.startswith(word)]
    if split == "all":
        return Source(name, _number(name, splits, list(splits)), split=False)
    wanted = tests[0] if split == "test" and tests else "train"
    if wanted not in splits:
        raise UserError(f"{name} has no train split, only {', '.join(splits)}", where="data.path")
    return Source(name, _number(name, splits, [wanted]), split=bool(tests))


def _number(source: str, splits: Any, names: list[str]) -> Iterator[Row]:
    for name in names:
        for number, row in enumerate(splits[name], 1):
            yield f"{source} {name} row {number}", dict(row)
