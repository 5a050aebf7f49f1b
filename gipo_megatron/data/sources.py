"""The sources of a data set and which of their rows are read: from a file, a folder, a folder of
`datasets.save_to_disk`, or the hub. docs/data.md has the rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gipo_megatron.data import tldr
from gipo_megatron.data.folders import Part, Row, file_parts, folder_parts
from gipo_megatron.data.hub import is_hub_name, offline, reach_hub
from gipo_megatron.data.readers import SUFFIXES, rows_of, suffix_of
from gipo_megatron.data.splits import HELD_OUT, split_of
from gipo_megatron.errors import UserError


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
    root = Path(path)
    archives: list[str] = []
    if root.is_file():
        parts = file_parts(root)
    elif root.is_dir():
        parts, archives = folder_parts(root)
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


def _hub_parts(path: str, names: list[str], format: str) -> list[Part]:
    import datasets  # slow to import

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
    import datasets

    if name in configurations:
        return datasets.load_dataset(path, name)
    return datasets.load_dataset(path, data_dir=name)


def _hub_split(path: str, name: str, splits: Any) -> Iterator[Part]:
    """`splits`: {split name: rows}, from `datasets.load_dataset`. A configuration that names a
    split is no source, as a folder is none."""
    source = name if name and not split_of([name]) else path.split("/")[-1]
    for split, rows in splits.items():
        place = f"{name or source} {split}"
        yield Part(place, source, split_of([name, split]), partial(rows_of, rows))
