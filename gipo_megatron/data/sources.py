"""The sources of a data set and which of their rows are read: from a file, a folder, a folder of
`datasets.save_to_disk`, or the hub. docs/data.md has the rule."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import FILES_TO_IGNORE, resolve_pattern, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from gipo_megatron.data import tldr
from gipo_megatron.data.hub import is_hub_name, offline, reach_hub
from gipo_megatron.data.readers import (
    ARCHIVES,
    COMPRESSED,
    SUFFIXES,
    Columns,
    is_one_object,
    read_file,
    suffix_of,
)
from gipo_megatron.data.splits import HELD_OUT, is_hidden, label_of, split_of
from gipo_megatron.errors import UserError

READABLE = f"{' '.join(SUFFIXES)} (also {' '.join(COMPRESSED)})"
METADATA = (*FILES_TO_IGNORE, "state.json")
Row = tuple[str, Columns]  # its place (file and line), its columns


@dataclass(frozen=True)
class Part:
    """Rows that lie together: a file, or one split of a loaded data set."""

    place: str
    source: str
    label: str  # test | validation | train | "": its names carry no mark
    read: Callable[[], Iterable[tuple[int, Columns]]]
    unit: str = "row"

    @property
    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises UserError where there are none or they cannot be read."""
        count = 0
        try:
            for number, row in self.read():
                count += 1
                yield f"{self.place} {self.unit} {number}", row
        except UserError:
            raise
        except Exception as error:  # readers and decompressors raise many kinds for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"cannot read the file: {reason}",
                where=f"{self.place}, after row {count}",
                fix="copy or make it again",
            ) from error
        if not count:
            raise UserError(
                "the file holds no rows", where=self.place, fix="remove it, or make it again"
            )


@dataclass(frozen=True)
class Source:
    """The parts of one source that are read for a split."""

    name: str
    parts: list[Part]
    split: bool  # True: the rows of the split alone; False: all rows, to be split by a hash
    unread: tuple[str, ...] = ()

    @property
    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part.rows


def open_sources(path: str, names: list[str], split: str, format: str) -> list[Source]:
    """Open the sources `names` (by default all), sorted by name; split = train | test | all; format
    = data.format.

    OpenAI's layout keeps `comparisons` and `posts` apart: there the default is the one that serves
    the format. Raises UserError when nothing is at `path`, for an unknown name, for a folder
    without data files, when all rows are held out, and when the hub cannot be reached.
    """
    if not path:
        raise UserError(
            "data.path is empty", where="data.path", fix="give a file, a folder or a hub name"
        )
    root = Path(path).expanduser()
    archives: list[str] = []
    if root.is_file():
        parts = _file_parts(root)
    elif root.is_dir():
        parts, archives = _folder_parts(root)
        parts = _named(parts, names or _default_names(format, _names(parts)), path)
    elif is_hub_name(path) and suffix_of(root) not in SUFFIXES:
        parts = _hub_parts(path, names, format)
    else:
        raise UserError(
            f"nothing at {path!r}",
            where="data.path",
            fix="give an existing file or folder, or a hub name (owner/name)",
        )
    sources = [
        _choose(name, [part for part in parts if part.source == name], split)
        for name in _names(parts)
    ]
    if not any(source.parts for source in sources):
        raise UserError(
            f"no train file in {path}: "
            + ", ".join(f"{part.place} is marked {part.label}" for part in parts[:5]),
            where="data.path",
            fix="rename the file or folder that you want to train on",
        )
    return [replace(sources[0], unread=(*sources[0].unread, *archives)), *sources[1:]]


def _names(parts: Iterable[Part]) -> list[str]:
    return sorted({part.source for part in parts})


def _choose(name: str, parts: list[Part], split: str) -> Source:
    """Held out: the parts marked test, else those marked validation, else a share by the hash.
    Train: the parts marked train, else those without a mark."""
    if split == "all":
        return Source(name, parts, split=False)
    labels = {part.label for part in parts}
    held_out = next((label for label in HELD_OUT if label in labels), None)
    train = "train" if "train" in labels else ""
    wanted = held_out if split == "test" and held_out else train
    unread = [part for part in parts if part.label not in (held_out, train)]
    return Source(
        name,
        [part for part in parts if part.label == wanted],
        split=held_out is not None,
        unread=tuple(f"{part.place} ({part.label or 'no mark'})" for part in unread),
    )


def _named(parts: list[Part], names: list[str], path: str) -> list[Part]:
    available = _names(parts)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(
            f"no source {', '.join(unknown)} in {path}",
            where="data.source",
            fix=f"there are {', '.join(available)}",
        )
    return [part for part in parts if not names or part.source in names]


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


# ---------------------------------------------------------------------------------------- folders


def _file_parts(file: Path) -> list[Part]:
    if suffix_of(file) in ARCHIVES:
        raise UserError(f"{file.name} is an archive", where=str(file), fix="unpack it first")
    if suffix_of(file) not in SUFFIXES:
        raise UserError(
            f"{file.name}: unknown kind of file", where=str(file), fix=f"use {READABLE}"
        )
    label = label_of(file, file.parent)
    return [Part(str(file), file.name.split(".")[0], label, partial(read_file, file), "line")]


def _folder_parts(root: Path) -> tuple[list[Part], list[str]]:
    """Return the parts of a folder and all below it, sorted by path, and the archives there."""
    declared, parts, other = _declared(root), [], []
    archives: list[str] = []
    for path in sorted(_walk(root)):
        if path.is_dir():
            parts += _saved_parts(path, root)
            continue
        suffix = suffix_of(path)
        label = split_of([declared.get(path.resolve(), ""), label_of(path, root)])
        described = suffix == ".json" and not label and is_one_object(path)
        if suffix in ARCHIVES:
            archives.append(f"{path} (an archive: unpack it)")
        elif suffix not in SUFFIXES or path.name in METADATA or described:
            other.append(path.name)
        else:
            source = _source_of(path.parent, root)
            parts.append(Part(str(path), source, label, partial(read_file, path), "line"))
    if not parts:
        found = [*archives, *other][:5]
        raise UserError(
            f"no data files in {root}" + (f"; found: {', '.join(found)}" if found else ""),
            where="data.path",
            fix=f"files must end in {READABLE}" + ("; unpack archives" if archives else ""),
        )
    return parts, archives


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files below `root` and the folders of `save_to_disk`, without hidden ones."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here, names = Path(folder), {*files}
        if here.resolve() in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(here.resolve())
        if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
            folders.clear()
            yield here
            continue
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (here / name for name in files if not is_hidden(name))


def _source_of(folder: Path, root: Path) -> str:
    """Return the first folder below `root` that names no split, else the name of `root`."""
    names = folder.relative_to(root).parts
    free = [name for name in names if name != "data" and not split_of([name])]
    return free[0] if free else root.resolve().name


def _saved_parts(folder: Path, root: Path) -> list[Part]:
    """Return the parts of a folder that `datasets.save_to_disk` wrote."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many kinds for damaged files
        raise UserError(
            f"cannot read what save_to_disk wrote: {error}", where=str(folder), fix="save it again"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    source = _source_of(folder, root)
    return [
        Part(
            f"{folder} {name}".rstrip(),
            source,
            split_of([name, label_of(folder, root)]),
            partial(_rows_of, rows),
        )
        for name, rows in splits.items()
    ]


def _declared(root: Path) -> dict[Path, str]:
    """Return the marks that the header of README.md gives files: the hub's `configs`."""
    if not (root / "README.md").is_file():
        return {}
    marks: dict[Path, str] = {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(root / "README.md").data)
        for name, config in configs.items():
            for split, patterns in sanitize_patterns(config.get("data_files") or {}).items():
                for pattern in patterns:
                    with suppress(FileNotFoundError):  # not downloaded
                        for file in resolve_pattern(pattern, str(root)):
                            path = Path(file).resolve()
                            marks[path] = f"{marks.get(path, '')} {name} {split}"
    except ValueError as error:
        raise UserError(
            f"unreadable header: {error}",
            where=str(root / "README.md"),
            fix="correct the header, or remove the file",
        ) from error
    return marks


def _rows_of(rows: Iterable[Any]) -> Iterator[tuple[int, Columns]]:
    return enumerate(map(dict, rows), 1)


# ------------------------------------------------------------------------------------------ the hub


def _hub_parts(path: str, names: list[str], format: str) -> list[Part]:
    fix = (
        "download it once and give the folder: data.path=FOLDER (with train*.jsonl, test*.parquet,"
        " … or one sub-folder a source)"
    )
    if not offline():
        reach_hub(path, "data.path", fix)
    try:
        configurations = datasets.get_dataset_config_names(path)
        names = names or _default_names(format, configurations)
        if not names and len(configurations) > 1 and "default" not in configurations:
            names = configurations
        loaded = {name: _load(path, name, configurations) for name in sorted(names)}
        if not loaded:
            loaded = {"": datasets.load_dataset(path)}
    # RuntimeError: a data set that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {path!r} from the hub: {str(error).splitlines()[0]}",
            where="data.path",
            fix=fix,
        ) from error
    return [part for name, splits in loaded.items() for part in _hub_split(path, name, splits)]


def _load(path: str, name: str, configurations: list[str]) -> Any:
    """Load the configuration, or else the sub-folder, `name`."""
    if name in configurations:
        return datasets.load_dataset(path, name)
    return datasets.load_dataset(path, data_dir=name)


def _hub_split(path: str, name: str, splits: Any) -> Iterator[Part]:
    """`splits`: {split name: rows}, from `datasets.load_dataset`. A configuration that names a
    split is no source, as a folder is none."""
    source = name if name and not split_of([name]) else path.split("/")[-1]
    for split, rows in splits.items():
        place = f"{name or source} {split}"
        yield Part(place, source, split_of([name, split]), partial(_rows_of, rows))
