"""Run one recipe at many settings, one run after the other.

python tools/sweep.py recipe=hh_gipo run.seed=0..4 algorithm.kl_controller.eta=0.02,0.05 [nproc=8]
[dry=true] [key=value …]

`a..b` counts from a to b; `a,b,c` is a list (commas inside […], {…} or quotes do not separate).
Checks every combination before the first starts; each has another run.dir. A run that fails is
reported at the end; the others continue.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gipo_megatron.cli import run
from gipo_megatron.commands import RECIPES
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.compose import compose

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"


@dataclass(frozen=True)
class Sweep:
    fixed: tuple[str, ...]  # words that all runs share
    varied: tuple[tuple[str, tuple[str, ...]], ...]  # key, its values
    nproc: int | None = None  # processes of each run; None: one
    dry: bool = False

    @property
    def points(self) -> list[tuple[str, ...]]:
        """Return one word per varied key, for each combination; the last key changes fastest."""
        return list(
            itertools.product(
                *([f"{key}={value}" for value in values] for key, values in self.varied)
            )
        )


def values_of(text: str) -> tuple[str, ...]:
    """`0..4` → 0 1 2 3 4; `a,b` → a b; anything else is one value."""
    if bounds := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        first, last = int(bounds[1]), int(bounds[2])
        return tuple(str(n) for n in range(first, last + 1))
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return tuple(parts)


def parse(argv: Sequence[str]) -> Sweep:
    """Raises UserError for an empty range and an unreadable nproc or dry."""
    fixed: list[str] = []
    varied: list[tuple[str, tuple[str, ...]]] = []
    nproc, dry = None, False
    for word in argv:
        key, _, text = word.partition("=")
        if key == "nproc":
            if not text.isdigit() or int(text) == 0:
                raise UserError(
                    f"nproc needs a number of processes, not {text!r}", where="command line"
                )
            nproc = int(text)
        elif key == "dry":
            if text not in ("true", "false"):
                raise UserError(f"dry needs true or false, not {text!r}", where="command line")
            dry = text == "true"
        else:
            values = (text,) if key in ("recipe", "with", "world") else values_of(text)
            if not values:
                raise UserError(
                    f"{word!r} is an empty range", where="command line", fix=f"{key}=0..4 counts up"
                )
            if len(values) == 1:
                fixed.append(word)
            else:
                varied.append((key, values))
    return Sweep(tuple(fixed), tuple(varied), nproc, dry)


def command(sweep: Sweep, point: Sequence[str], recipes: Path) -> list[str]:
    """Return the command of one combination; its folder is the recipe's run.dir and the point's
    settings. Raises RecipeErrors."""
    words = [*sweep.fixed, *point]
    recipe = compose(words, recipes, world=sweep.nproc or 1)
    if point:
        words.append(f"run.dir={recipe.run.dir}/{','.join(_label(word, sweep) for word in point)}")
    words = [word for word in words if not word.startswith("world=")]
    several = [] if sweep.nproc is None else ["--nproc", str(sweep.nproc)]
    return [sys.executable, str(TRAIN), *several, *words]


def _label(word: str, sweep: Sweep) -> str:
    """`run.seed=3` → `seed=3`, fit for a folder's name."""
    key, _, value = word.partition("=")
    return f"{_short(key, sweep)}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value)}"


def _short(key: str, sweep: Sweep) -> str:
    """Return the key's last part, or all of it where two varied keys end alike."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other, _ in sweep.varied) == 1 else key


def main(argv: Sequence[str], recipes: Path = RECIPES) -> int:
    sweep = parse(argv)
    commands = [command(sweep, point, recipes) for point in sweep.points]
    failed: list[tuple[str, int]] = []
    for number, words in enumerate(commands, 1):
        line = shlex.join(words)
        print(f"[{number}/{len(commands)}] {line}", flush=True)
        if not sweep.dry and (
            code := subprocess.run(words, env=os.environ, check=False).returncode
        ):
            failed.append((line, code))
    for line, code in failed:
        print(f"failed with {code}: {line}", file=sys.stderr)
    if not sweep.dry:
        print(f"{len(commands) - len(failed)} of {len(commands)} runs finished")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
