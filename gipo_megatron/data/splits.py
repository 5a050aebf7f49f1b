"""The rules by which rows are trained on or held out, and by which training rows form parts: by the
marks of their names, or by a hash of their prompts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gipo_megatron.data.examples import Turn

# label -> words that mark it. A held-out word wins over train; test wins over validation.
MARKS = {
    "test": ("test", "tests", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"),
    "train": ("train", "training"),
}
HELD_OUT = ("test", "validation")
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+")  # TestRows: Test, Rows


def split_of(names: Iterable[str]) -> str:
    """Return the label that names of folders, files, configurations or splits carry, or ""."""
    words = {word for name in names for word in _words(name)}
    return next((label for label, marks in MARKS.items() if words & {*marks}), "")


def is_split_name(name: str) -> bool:
    """Check for a name that marks a split and carries nothing else, as test or train-00."""
    return all(split_of([word]) for word in _LETTERS.findall(name)) and bool(split_of([name]))


def is_hidden(name: str) -> bool:
    """Check for a file or folder that systems and editors keep for themselves, as .git, ._rows,
    __MACOSX, _SUCCESS, @eaDir, ~$rows or rows~."""
    return name[:1] in tuple("._~$#@") or name.endswith("~")


def _words(name: str) -> set[str]:
    """`held-out` is heldout, too; `testset` and `testdata` are test."""
    parts = [part for letters in _LETTERS.findall(name) for part in _CAMEL.findall(letters)]
    words = [part.lower() for part in parts]
    joined = [first + second for first, second in pairwise(words)]
    return {re.sub("(set|data|split)$", "", word) for word in (*words, *joined)}


def label_of(path: Path, root: Path) -> str:
    """Return the label of a file below `root`. The name of `root` counts where no name below it is
    marked."""
    below, own = split_of(path.relative_to(root).parts), root.resolve().name
    return below or (split_of([own]) if is_split_name(own) else "")


def label_of_row(row: dict[str, Any]) -> str:
    """Return the label that a row's own column `split` carries, or ""."""
    return split_of([row["split"]]) if isinstance(row.get("split"), str) else ""


def divide(marks: Sequence[str], prompts: Sequence[tuple[Turn, ...]], share: float) -> list[bool]:
    """Return for each row whether it is held out: by its own mark, else by the hash."""
    unmarked = (prompt for mark, prompt in zip(marks, prompts, strict=True) if not mark)
    hashed = iter(hold_out(list(unmarked), share))
    return [mark in HELD_OUT if mark else next(hashed) for mark in marks]


def hold_out(prompts: Sequence[tuple[Turn, ...]], share: float) -> list[bool]:
    """Hold out the prompts whose beginning has a hash below `share`, so that conversations with the
    same beginning are on one side.

    A beginning is the first human turn. One that more than `share` of the rows have grows by a turn
    at a time; the whole prompt, with its system turn, comes last. Both sides get a row where
    beginnings differ and 0 < share < 1.
    """
    depth, keys = 1, [_beginning(prompt, 1) for prompt in prompts]
    while True:
        counts, many = Counter(keys), max(1.0, share * len(keys))
        grown = [
            _beginning(prompt, depth + 1) if counts[key] > many else key
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        if grown == keys:
            break
        depth, keys = depth + 1, grown
    hashes, bound = {key: _hash(key) for key in keys}, share * 2**64
    if 0 < share < 1 and len(hashes) > 1:
        first, *_, last = sorted(hashes.values())
        bound = min(max(bound, first + 1), last)
    return [hashes[key] < bound for key in keys]


def part_of(prompt: tuple[Turn, ...], parts: int) -> int:
    """Return the part, 1 to `parts`, of a prompt's first human turn: a hash that is independent of
    `hold_out`'s."""
    return 1 + (_hash("part\0" + _beginning(prompt, 1)) * parts >> 64)


def _beginning(prompt: tuple[Turn, ...], turns: int) -> str:
    start = next((i for i, turn in enumerate(prompt) if turn.role == "user"), 0)
    chosen = prompt[start : start + turns] if start + turns <= len(prompt) else prompt
    return "\0".join(turn.text.strip() for turn in chosen)


def _hash(text: str) -> int:
    """Return a number below 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
