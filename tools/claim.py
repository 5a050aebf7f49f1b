"""Check the demo's claim on two runs: GIPO's final gold on the worse group is higher than that of
PPO with KL, and its mean is not lower.

python tools/claim.py PPO_KL GIPO [--also RUN …] [--report PATH]

Prints the gold and the KL of both, whether the claim holds on this run, and study S3's table of
several seeds; --report writes the report of all runs with the same words. Without gold in the runs
(data of your own) no claim is checked. Exit code 0, whether the claim holds or not: one seed
decides nothing, and a demo that ran to its end has not failed. 2: a mistake in the command.
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
from gipo_megatron.reports.run_report import Claim, write_report
from gipo_megatron.reports.runs import RunFolder, SeedGroup, load_run

TOLERANCE = 0.02  # the mean may be lower by this much
EQUAL_KL = 0.1  # of the larger KL: below, two KL count as equal
STUDY = Path(__file__).resolve().parent.parent / "docs/studies/s3_tables.md"


def difference(runs: list[RunFolder], column: str, names: list[str]) -> tuple[float, float | None]:
    """Return GIPO's final gold − PPO's, and its standard error over prompts: paired, but where the
    worse group of one run is not that of the other."""
    ends = [[*gold.curve(run, column, names).values()][-1] for run in runs]
    places = [gold.worst_source(r, names) if column == gold.WORSE else column for r in runs]
    if places[0] == places[1]:
        a, b = (gold.by_prompt(run, places[0]) for run in runs)
        pairs = [b[prompt] - a[prompt] for prompt in a if prompt in b]
        return ends[1] - ends[0], gold.error_over_prompts(runs[1], places[0], pairs)
    apart = [gold.error(SeedGroup("", [run]), column, names) for run in runs]
    known = [noise for noise in apart if noise is not None]
    return ends[1] - ends[0], hypot(*known) if len(known) == 2 else None


def judge(runs: list[RunFolder], study: Path = STUDY) -> Claim | None:
    """Return the verdict on [PPO with KL, GIPO] with what it rests on; None without the data's
    gold by source in both."""
    sources, others = (gold.sources_of([SeedGroup(run.name, [run])]) for run in runs)
    if not sources or sources != others or not all(map(gold.of_the_data, runs)):
        return None
    worse, noise = difference(runs, gold.WORSE, sources)
    mean, mean_noise = difference(runs, gold.MEAN, sources)
    holds = "holds" if worse > 0 and mean >= -TOLERANCE else "does NOT hold"
    verdict = (
        "Claim: GIPO's final gold on the worse group is higher than that of PPO with KL, and the"
        f" mean is not lower (tolerance {TOLERANCE}). It {holds} on this run."
    )
    sentences = [
        f"GIPO − PPO with KL: worse group {gold.with_error(worse, noise, '+')}, mean"
        f" {gold.with_error(mean, mean_noise, '+')}. ±: one standard error over the same held-out"
        " prompts, without the spread over seeds.",
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
    lines = study.read_text(encoding="utf-8").splitlines() if study.is_file() else []
    table = takewhile(lambda x: x[:1] == "|", dropwhile(lambda x: x[:1] != "|", lines))
    rows = [[cell.strip(" *") for cell in line.strip()[1:-1].split("|")] for line in table]
    if not rows:
        command = "python tools/study.py s3 docs=docs/studies"
        return f"Several seeds: no table in {study.name} yet; `{command}` writes it.", []
    return f"Several seeds, from docs/studies/{study.name}:", rows[:1] + rows[2:]


def show(table: Sequence[Sequence[str]]) -> None:
    if len(table) > 1:
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
        print("These data have no gold reward: the claim is not checked.")
    else:
        show(gold.table([SeedGroup(run.name, [run]) for run in runs]))
        print("\n".join(["", claim.verdict, *claim.sentences, "", claim.caption]))
        show(claim.table)
    if options.report:
        report = write_report([*options.also, *options.runs], options.report, claim=claim)
        print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
