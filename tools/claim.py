"""Check the demo's claim on two runs: GIPO's final gold on the worse group is higher than that of
PPO with KL, and its mean is not lower.

python tools/claim.py PPO_KL GIPO [--also RUN …] [--report PATH]

Prints the gold of both, whether the claim holds on this run, both KL, and the table of several
seeds from study S3. --report writes the report of all runs with the same words. Without gold in the
runs (data of your own) no claim is checked.

Exit code 0, whether the claim holds or not: one seed decides nothing, and a demo that ran to its
end has not failed. 2: a mistake in the command or in a run folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import dropwhile, takewhile
from math import hypot
from pathlib import Path

from gipo_megatron.cli import run
from gipo_megatron.commands.plot import print_table
from gipo_megatron.reports import gold
from gipo_megatron.reports.gold import MEAN, WORSE, with_error
from gipo_megatron.reports.run_report import Claim, write_report
from gipo_megatron.reports.runs import RunFolder, SeedGroup, load_run

TOLERANCE = 0.02  # the mean may be lower by this much
EQUAL_KL = 0.1  # of the larger KL: below, two KL count as equal
STUDY = Path(__file__).resolve().parent.parent / "docs/studies/s3_tables.md"


def difference(
    runs: Sequence[RunFolder], column: str, sources: list[str]
) -> tuple[float, float | None]:
    """Return GIPO's final gold − PPO's, and its standard error over prompts: paired, but where the
    worse group of one run is not that of the other."""
    ends = [[*gold.curve(run, column, sources).values()][-1] for run in runs]
    places = [gold.worst_source(r, sources) if column == WORSE else column for r in runs]
    a, b = (gold.by_prompt(run, place) for run, place in zip(runs, places, strict=True))
    if places[0] == places[1]:
        pairs = [b[prompt] - a[prompt] for prompt in a if prompt in b]
        return ends[1] - ends[0], gold.error_over_prompts(runs[1], places[1], pairs)
    first = gold.error_over_prompts(runs[0], places[0], [*a.values()])
    second = gold.error_over_prompts(runs[1], places[1], [*b.values()])
    noise = None if first is None or second is None else hypot(first, second)
    return ends[1] - ends[0], noise


def judge(runs: Sequence[RunFolder], study: Path = STUDY) -> Claim | None:
    """Return the verdict on [PPO with KL, GIPO] with what it rests on; None without gold by
    source in both."""
    sources, others = (gold.sources_of([SeedGroup(run.name, [run])]) for run in runs)
    if not sources or sources != others:
        return None
    worse, noise = difference(runs, WORSE, sources)
    mean, mean_noise = difference(runs, MEAN, sources)
    holds = worse > 0 and mean >= -TOLERANCE
    verdict = (
        "Claim: GIPO's final gold on the worse group is higher than that of PPO with KL, and the"
        f" mean is not lower (tolerance {TOLERANCE})."
        f" It {'holds' if holds else 'does NOT hold'} on this run."
    )
    sentences = [
        f"GIPO − PPO with KL: worse group {with_error(worse, noise, '+')}, mean"
        f" {with_error(mean, mean_noise, '+')}. ±: one standard error over the same held-out"
        " prompts; another seed differs by more.",
        equal_kl(*(run.last("eval/kl") for run in runs)),
    ]
    if noise is None or abs(worse) < 2 * noise:
        size = "of unknown standard error" if noise is None else "within two standard errors"
        sentences.insert(1, f"The worse group's difference is {size}: no difference is shown.")
    return Claim(verdict, sentences, *several_seeds(study))


def equal_kl(ppo: float | None, gipo: float | None) -> str:
    if ppo is None or gipo is None:
        return "The KL of a run is not known: the comparison may not be at equal KL."
    equal = abs(gipo - ppo) <= EQUAL_KL * max(abs(ppo), abs(gipo))
    return (
        f"KL to the reference: PPO with KL {ppo:.2f}, GIPO {gipo:.2f} nats per response. The"
        f" comparison is {'' if equal else 'NOT '}at equal KL (within {EQUAL_KL:.0%})"
        f"{'.' if equal else ': another KL coefficient alone could make such a difference.'}"
    )


def several_seeds(study: Path) -> tuple[str, list[list[str]]]:
    """Return a caption and the first table of the study's page, its header first."""
    if not study.is_file():
        return f"Several seeds: {study.name} is missing; `python tools/study.py s3` writes it.", []
    lines = study.read_text(encoding="utf-8").splitlines()
    table = takewhile(lambda x: x.startswith("|"), dropwhile(lambda x: x[:1] != "|", lines))
    rows = [[cell.strip(" *") for cell in line.strip()[1:-1].split("|")] for line in table]
    return f"Several seeds, from docs/studies/{study.name}:", rows[:1] + rows[2:]


def show(table: Sequence[Sequence[str]]) -> None:
    if table:
        print_table([dict(zip(table[0], row, strict=False)) for row in table[1:]])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("claim.py", usage=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("runs", nargs=2)
    parser.add_argument("--also", nargs="+", default=[])
    parser.add_argument("--report")
    options = parser.parse_args(arguments)
    runs = [load_run(folder) for folder in options.runs]
    claim = judge(runs)
    if claim is None:
        print("No gold reward in these runs: the demo's claim is not checked.")
    else:
        show(gold.table([SeedGroup(run.name, [run]) for run in runs]))
        print("\n".join(["", claim.verdict, *claim.sentences, "", claim.caption]))
        show(claim.table)
    if options.report:
        folders = [*options.also, *options.runs]
        print(f"report: {write_report(folders, options.report, claim=claim)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
