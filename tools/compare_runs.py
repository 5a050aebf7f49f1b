"""Compare the metrics of two runs:  python tools/compare_runs.py A B [--assert-equal] [--tolerance
X]

Compares metrics.jsonl step by step, but for time/, perf/, memory/ and rollout/tokens_per_second.
--assert-equal: bit for bit; with --tolerance X: |a - b| <= X max(|a|, |b|). Exit codes: 0 equal, or
neither option; 1 the runs differ; 2 a mistake in the command or in a run folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from gipo_megatron.cli import run
from gipo_megatron.errors import UserError
from gipo_megatron.reports.runs import RunFolder, load_run

IGNORED = ("time/", "perf/", "memory/", "rollout/tokens_per_second")
ROWS_SHOWN = 15


@dataclass(frozen=True)
class Difference:
    """`a` and `b` are the values in the files; "absent": no such row or metric."""

    step: int
    metric: str
    a: Any
    b: Any
    size: float  # relative, |a - b| / max(|a|, |b|); infinite when one is absent or null


def compare(a: RunFolder, b: RunFolder) -> tuple[list[Difference], int]:
    """Return all differences by step, then in order of the metrics, and the count of numbers."""
    rows_a, rows_b = _by_step(a), _by_step(b)
    differences, compared = [], 0
    for step in sorted(rows_a.keys() | rows_b.keys()):
        if step not in rows_a or step not in rows_b:
            differences.append(
                Difference(
                    step,
                    "(the whole row)",
                    *(("there", "absent") if step in rows_a else ("absent", "there")),
                    math.inf,
                )
            )
            continue
        x, y = rows_a[step], rows_b[step]
        for name in dict.fromkeys([*x, *y]):
            compared += 1
            if name not in x or name not in y:
                differences.append(
                    Difference(step, name, x.get(name, "absent"), y.get(name, "absent"), math.inf)
                )
            elif (size := _size(x[name], y[name])) > 0:
                differences.append(Difference(step, name, x[name], y[name], size))
    return differences, compared


def _by_step(run: RunFolder) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for row in run.rows:
        if row["step"] in rows:
            raise UserError(
                f"step {row['step']} has two rows",
                where=str(run.path / "metrics.jsonl"),
                fix="one row a step: was the run resumed by hand?",
            )
        rows[row["step"]] = {
            k: v for k, v in row.items() if k != "step" and not k.startswith(IGNORED)
        }
    return rows


def _size(x: Any, y: Any) -> float:
    """Return the relative difference; 0 only for equal bits (null equals null, 0.0 is not -0.0)."""
    if isinstance(x, (int, float)) and isinstance(y, (int, float)):
        if float(x).hex() == float(y).hex():
            return 0.0
        return abs(x - y) / max(abs(x), abs(y), sys.float_info.min) or sys.float_info.min
    return 0.0 if x == y else math.inf


def show(differences: list[Difference], compared: int) -> None:
    """Print the largest difference of each metric, largest first."""
    worst: dict[str, Difference] = {}
    count: dict[str, int] = {}
    for d in differences:
        count[d.metric] = count.get(d.metric, 0) + 1
        if d.metric not in worst or d.size > worst[d.metric].size:
            worst[d.metric] = d
    print(
        f"{compared} numbers compared, {len(differences)} differ"
        + (" (bit for bit)" if not differences else "")
    )
    if not worst:
        return
    ordered = sorted(worst.values(), key=lambda d: (-d.size, d.step))
    width = max(len(d.metric) for d in ordered[:ROWS_SHOWN])
    print(
        f"{'metric':<{width}}  {'rows':>5}  {'worst step':>10}  {'a':>24}  {'b':>24} "
        f" {'relative':>9}"
    )
    for d in ordered[:ROWS_SHOWN]:
        print(
            f"{d.metric:<{width}}  {count[d.metric]:>5}  {d.step:>10}  {d.a!s:>24}  {d.b!s:>24} "
            f" {d.size:>9.3g}"
        )
    if len(ordered) > ROWS_SHOWN:
        print(f"… and {len(ordered) - ROWS_SHOWN} more metrics")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="compare_runs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="run folder")
    parser.add_argument("b", metavar="B", help="run folder")
    parser.add_argument(
        "--assert-equal", action="store_true", help="exit 1 at a difference, naming the first"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="X",
        help="relative; implies --assert-equal",
    )
    options = parser.parse_args(arguments)
    try:
        if options.tolerance is not None and not options.tolerance >= 0:
            raise UserError(f"--tolerance {options.tolerance} is not a number >= 0")
        a, b = load_run(options.a), load_run(options.b)
        differences, compared = compare(a, b)
        if not compared:
            raise UserError(
                "nothing to compare: the runs have no step in common",
                where=f"{options.a}, {options.b}",
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(differences, compared)
    if not options.assert_equal and options.tolerance is None:
        return 0
    beyond = [d for d in differences if d.size > (options.tolerance or 0.0)]
    if beyond:
        d = beyond[0]
        print(
            f"DIFFER first at step {d.step}, {d.metric}: {d.a} and {d.b} (relative {d.size:.3g});"
            f" {len(beyond)} in all",
            file=sys.stderr,
        )
        return 1
    print("equal" + (f" within {options.tolerance:g}" if options.tolerance else ", bit for bit"))
    return 0


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
