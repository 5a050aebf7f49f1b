"""The comparisons of study S3 that were registered before the run, its tables and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.studies import tables
from tools.studies.compare import BASELINE, MARGIN, Difference, Finding, Rule, WorldCells
from tools.studies.curves import Cell, outcomes, stacked
from tools.studies.inference import sign_flip

WORLD = "planted language"
HEAD, VALUE = "gipo_head", "gipo_value"
# written before the run (docs/studies/s3.md)
RULE = Rule(
    [(WORLD, system, "kl") for system in (HEAD, VALUE, "adaptive")],
    lambda worse, mean: max(sign_flip(worse), sign_flip(mean + MARGIN)),
)
PRIMARY = ("worse", "mean", "easy", "hard")
SECONDARY = ("peak", "decline", "gap", "proxy", "questions")
NUMBERS = ("kl", *PRIMARY, *SECONDARY, "label")


def as_world(cells: Sequence[Cell]) -> WorldCells:
    """Return the outcomes by system and η, seeds in order."""
    runs: dict[str, dict[float, list[dict[str, float]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        of_eta = runs.setdefault(cell.system, {})
        of_eta.setdefault(cell.eta, []).append(outcomes(cell.curve))
    of = {
        system: {eta: stacked(found) for eta, found in sorted(of_eta.items())}
        for system, of_eta in runs.items()
    }
    etas = {eta for system, of_eta in of.items() if system != BASELINE for eta in of_eta}
    return WorldCells(WORLD, of, sorted(etas))


def value_against_head(world: WorldCells) -> Difference | None:
    """Return the worse source's difference of the value split minus that of the learned head, both
    to PPO with KL at equal KL; None where one of them has none."""
    if not {HEAD, VALUE} <= world.of.keys():
        return None
    value, head = (world.difference(system, "worse", "kl") for system in (VALUE, HEAD))
    if value is None or head is None:
        return None
    return Difference(value.values - head.values, value.etas)


def default_classifier(world: WorldCells) -> str:
    """Return the system whose classifier the rule makes the default."""
    found = value_against_head(world)
    return VALUE if found is not None and found.interval[0] > 0 else HEAD


def page(
    world: WorldCells, findings: Sequence[Finding], labels: Mapping[str, str], setting: str
) -> str:
    """Return the page of all tables."""
    found = value_against_head(world)
    default = (
        f"Worse source, value split − learned head: {found.text() if found else tables.OUTSIDE}."
        f" By the rule, the default is: {labels[default_classifier(world)]}."
    )
    parts = [
        "# Study S3: tables",
        f"{setting} [The question, the measures and the falsifier](s3.md). Intervals are"
        " 95 % percentile bootstrap intervals over seeds. A difference is system − PPO with KL,"
        " paired by seed, averaged over the η that lie on the curve of every seed.",
        "![Gold of easy and hard prompts against iterations, and of the worse source against KL]"
        "(s3.svg)",
        "## The pre-registered comparisons",
        "p is after Holm over these rows.",
        tables.registered(findings, labels),
        "## The default classifier",
        default,
        "## All systems at equal KL",
        tables.OWN_POINT,
        tables.compared([world], labels, "kl", PRIMARY),
        tables.compared([world], labels, "kl", SECONDARY),
        "## Every cell",
        "The mean over seeds. label: agreement of the labels with the sources, 0.5 is chance.",
        every_cell(world, labels),
    ]
    return "\n\n".join(parts) + "\n"


def every_cell(world: WorldCells, labels: Mapping[str, str]) -> str:
    rows = [
        [
            labels[system],
            f"{eta:g}",
            *(tables.with_interval(cell[name]) for name in PRIMARY[:2]),
            *(f"{cell[name].mean():.3f}" for name in NUMBERS if name not in PRIMARY[:2]),
        ]
        for system in labels
        for eta, cell in world.of.get(system, {}).items()
    ]
    names = [name for name in NUMBERS if name not in PRIMARY[:2]]
    return tables.markdown_table(["system", "η", *PRIMARY[:2], *names], rows)


def csv(cells: Sequence[Cell]) -> str:
    """Return the outcomes of every cell, one a line."""
    lines = [",".join(("seed", "system", "eta", *NUMBERS))]
    for cell in cells:
        end = outcomes(cell.curve)
        numbers = [f"{end[name]:.4f}" for name in NUMBERS]
        lines.append(",".join([str(cell.seed), cell.system, f"{cell.eta:g}", *numbers]))
    return "\n".join(lines) + "\n"
