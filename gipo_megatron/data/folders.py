"""Parts of a data set in files and folders, with the label that their names carry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gipo_megatron.data.readers import (
    ARCHIVES,
    COMPRESSED,
    SUFFIXES,
    Columns,
    is_one_object,
    read_file,
    rows_of,
    suffix_of,
)
from gipo_megatron.data.splits import is_hidden, label_of, split_of
from gipo_megatron.errors import UserError
from gipo_megatron.files import inside, leads_out

READABLE = f"{' '.join(SUFFIXES)} (also {' '.join(COMPRESSED)})"
Row = tuple[str, Columns]  # its place (file and line), its columns


@dataclass(frozen=True)
class Part:
    """Rows of one place: a file, or one split of a loaded data set."""

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


def file_parts(file: Path) -> list[Part]:
    if suffix_of(file) in ARCHIVES:
        raise UserError(f"{file.name} is an archive", where=str(file), fix="unpack it first")
    if suffix_of(file) not in SUFFIXES:
        raise UserError(
            f"{file.name}: unknown kind of file", where=str(file), fix=f"use {READABLE}"
        )
    label = label_of(file, file.parent)
    return [Part(str(file), file.name.split(".")[0], label, partial(read_file, file), "line")]


def folder_parts(root: Path) -> tuple[list[Part], list[str]]:
    """Return the parts of a folder and all below it, sorted by path, and the archives there."""
    from datasets.data_files import FILES_TO_IGNORE  # slow to import

    metadata = (*FILES_TO_IGNORE, "state.json")
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
        elif suffix not in SUFFIXES or path.name in metadata or described:
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
    import datasets

    try:
        _check_saved(folder)
        loaded = datasets.load_from_disk(str(folder))
    except UserError:
        raise
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
            partial(rows_of, rows),
        )
        for name, rows in splits.items()
    ]


def _check_saved(folder: Path) -> None:
    """Raise UserError for a file that a folder of `save_to_disk` names outside of it."""
    index = folder / "dataset_dict.json"
    splits = json.loads(index.read_text(encoding="utf-8"))["splits"] if index.is_file() else ["."]
    for split in splits:
        state = folder / split / "state.json"
        if split != ".":
            inside(folder, split, str(index))
        for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
            inside(state.parent, part["filename"], str(state))


def _declared(root: Path) -> dict[Path, str]:
    """Return the marks that the header of README.md gives files: the hub's `configs`."""
    if not (root / "README.md").is_file():
        return {}
    from datasets.data_files import resolve_pattern, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    marks: dict[Path, str] = {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(root / "README.md").data)
        for name, config in configs.items():
            for split, patterns in sanitize_patterns(config.get("data_files") or {}).items():
                for pattern in patterns:
                    if leads_out(pattern) or ":" in pattern:
                        continue  # other places, and addresses: no files of this folder
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
