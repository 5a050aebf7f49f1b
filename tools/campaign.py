"""A campaign of faults: each trial breaks something, and checks what is left.

python tools/campaign.py [--seed 0] [--out runs/campaign] [--only LINE …] [--small]

OUT/results.jsonl has a row for each trial; the same command continues there. OUT/table.md is the
table of docs/reliability.md, which is printed, too. The folder of a lost trial stays in OUT/lost.
--only: some lines of the table; --small: the few trials that `make test` runs.

Exit code 0: all trials that should be survived were; 1: one was lost; 2: a mistake in the command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.cli import run
from gipo_megatron.errors import UserError
from gipo_megatron.files import append_jsonl, read_jsonl, write_text
from gipo_megatron.training.run_lock import RunLock
from tools.faults.trial import Bench, Lost, Trial

# modules of tools/faults, each with trials() and SURVIVED: {line: what "survived" means}
PARTS = (
    "kills",
    "storage",
    "machine",
    "state",
    "folders",
    "numbers",
    "hangs",
    "network",
    "texts",
    "fuzz",
)
HEAD = ("line", "survived", "what survived means", "seconds")


@dataclass(frozen=True)
class Result:
    """A row of results.jsonl."""

    line: str
    case: str
    seconds: float
    lost: str = ""  # what was not survived; empty: it was
    known: str = ""  # Trial.known


def main(argv: Sequence[str]) -> int:
    words = _words(argv)
    trials, survived = _trials(words.only, small=words.small)
    with RunLock(words.out.resolve()) as lock:
        lock.take()
        return _campaign(words.out.resolve(), words.seed, trials, survived)


def _campaign(out: Path, seed: int, trials: Sequence[Trial], survived: Mapping[str, str]) -> int:
    """Run the trials that OUT has no results of, and write its table. Returns the exit code."""
    _check_seed(out, seed)
    results = _finished(out)
    try:
        for trial in trials:
            if (trial.line, trial.case) not in results:
                result = _try(trial, out, seed)
                append_jsonl(out / "results.jsonl", [vars(result)])
                results[trial.line, trial.case] = result
    finally:  # after Ctrl-C, too
        wanted = [results[key] for t in trials if (key := (t.line, t.case)) in results]
        table = _table(wanted, survived)
        write_text(out / "table.md", table)
        print(f"{table}{len(wanted)} of {len(trials)} trials done; {out / 'results.jsonl'}")
    return int(any(result.lost and not result.known for result in wanted))


def _words(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="campaign.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--only", nargs="+", default=[], metavar="LINE")
    parser.add_argument("--small", action="store_true")
    return parser.parse_args(argv)


def _trials(only: Sequence[str], *, small: bool) -> tuple[list[Trial], dict[str, str]]:
    """Return the trials, and {line: what "survived" means}. Raises UserError for an unknown
    line."""
    trials: list[Trial] = []
    survived: dict[str, str] = {}
    for name in PARTS:
        part: Any = importlib.import_module(f"tools.faults.{name}")
        trials += part.trials()
        survived |= part.SURVIVED
    if unknown := set(only) - survived.keys():
        lines = ", ".join(survived)
        raise UserError(
            f"no line {min(unknown)!r}", where="--only", fix=f"choose from these: {lines}"
        )
    chosen = [t for t in trials if (not only or t.line in only) and (t.small or not small)]
    return chosen, survived


def _check_seed(out: Path, seed: int) -> None:
    """Write OUT/seed. Raises UserError where OUT belongs to another seed."""
    file = out / "seed"
    if file.exists() and file.read_text(encoding="utf-8") != f"{seed}\n":
        what = f"{out} has trials of seed {file.read_text(encoding='utf-8').strip()}"
        raise UserError(what, where="--seed", fix="give that seed, or another --out")
    write_text(file, f"{seed}\n")


def _finished(out: Path) -> dict[tuple[str, str], Result]:
    rows = [Result(**row) for _, row in read_jsonl(out / "results.jsonl")]
    return {(row.line, row.case): row for row in rows}


def _try(trial: Trial, out: Path, seed: int) -> Result:
    """Run a trial in a folder of its own, and print its end."""
    folder, name = out / "trial", f"{trial.line}: {trial.case}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (out / "base").mkdir(exist_ok=True)
    bench = Bench(folder, out / "base", random.Random(f"{seed}/{name}"))
    lost, start = "", time.monotonic()
    try:
        trial.run(bench)
    except Lost as what:
        lost = str(what)
    except Exception as error:  # a check that failed otherwise is no survival either
        lost = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    if lost:
        kept = out / "lost" / "".join(c if c.isalnum() else "_" for c in name)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        folder.rename(kept)
    else:
        shutil.rmtree(folder)
    print(f"{name}: {'LOST: ' + lost if lost else 'survived'} ({seconds:.1f} s)", flush=True)
    return Result(trial.line, trial.case, round(seconds, 2), lost, trial.known)


def _table(results: Iterable[Result], survived: Mapping[str, str]) -> str:
    """Return the Markdown table; a line that is not survived as a whole ends with the reason."""
    lines: dict[str, list[Result]] = {}
    for result in results:
        lines.setdefault(result.line, []).append(result)
    rows = [HEAD, ("---",) * len(HEAD)]
    for line, found in lines.items():
        good = sum(not result.lost for result in found)
        why = next((r.known or r.lost.splitlines()[0] for r in found if r.lost), "")
        meaning = survived[line] + (f"; **not survived**: {why}" if why else "")
        seconds = sum(result.seconds for result in found)
        rows.append((line, f"{good} of {len(found)}", meaning, f"{seconds:.0f}"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    # for the fork server, which imports tools.faults.preloaded
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(partial(main, sys.argv[1:])))
