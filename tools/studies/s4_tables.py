"""The Markdown page of S4's tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from tools.studies.s4_cells import BASELINE, CELLS, CONTROLS, START, Accuracy, Cell, Models
from tools.studies.s4_compare import DIFFICULTY, SOURCES, Study, findings
from tools.studies.systems import SYSTEMS
from tools.studies.tables import OUTSIDE, markdown_table


def label(system: str) -> str:
    return "the model before PPO" if system == START else SYSTEMS[system].label


def page(study: Study, models: Sequence[Models], stop: float, needed: int) -> str:
    """Return the whole page; `stop`: bound of the stop rule; `needed`: seeds of a verdict."""
    parts = ["# Study S4: tables", INTRODUCTION, "## The reward models", judges(models)]
    stopped = [found.seed for found in models if found.gold.low <= stop]
    if stopped:
        seeds = ", ".join(map(str, stopped))
        parts.append(
            f"**Stopped at seed {seeds}.** The lower 95 % bound of the gold models' accuracy is not"
            f" above {stop:g}, so they cannot judge: nothing is shown."
        )
    if study.seeds:
        cell = study.of[study.seeds[0], START, 0.0]
        parts += [
            "![Gold against KL](s4.svg)",
            "## The pre-registered comparisons",
            f"{len(study.complete)} complete seeds, {len(cell.prompts)} test prompts.",
            registered(study, needed),
            "## All systems at equal KL",
            compared(study),
            "## All cells",
            "Means over seeds. Wins, ties and losses are against PPO with KL at the same η, by"
            " gold; the length-controlled rate is its preference if both were equally long.",
            every(study),
        ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = (
    "Written by `python tools/study.py s4`; [the question and the falsifier](s4.md). Gold and proxy"
    " are distances to the score of the data's chosen response, in units of the models' usual"
    " margin of a test pair. Intervals are 95 % bootstrap intervals over test prompts and seeds."
)


def judges(models: Sequence[Models]) -> str:
    """Return a row for each seed."""
    rows = [
        [
            str(found.seed),
            found.device,
            str(found.gold.pairs),
            _accuracy(found.proxy),
            _accuracy(found.gold),
            " / ".join(f"{share:.3f}" for share in found.members),
        ]
        for found in models
    ]
    head = ["seed", "device", "test pairs", "proxy", "gold, ensemble", "its members"]
    return markdown_table(head, rows)


def _accuracy(found: Accuracy) -> str:
    return f"{found.share:.3f} [{found.low:.3f}, {found.high:.3f}]"


def registered(study: Study, needed: int) -> str:
    rows = [
        [
            label(f.system),
            f.kind,
            f.worse.text() if f.worse else "",
            f"{f.p:.3f}",
            f.mean.text() if f.mean else "",
            f.verdict(needed),
        ]
        for f in findings(study)
    ]
    return markdown_table(
        ["system", "groups by", "worse group", "p (Holm)", "mean", "verdict"], rows
    )


def compared(study: Study) -> str:
    """Return, for every system that was run, mean and each group at equal KL."""
    rows = []
    for system in [name for name, _ in (*CELLS, *CONTROLS) if name != BASELINE]:
        if not any(key[1] == system for key in study.of):
            continue
        texts = [_text(study, system, "", "")]
        for kind in (SOURCES, DIFFICULTY):
            names = study.groups(study.seeds[0], kind)
            texts.append(", ".join(f"{name} {_text(study, system, kind, name)}" for name in names))
        rows.append([label(system), *texts])
    return markdown_table(["system", "mean", "by source", "by difficulty"], rows)


def _text(study: Study, system: str, kind: str, group: str) -> str:
    found = study.difference(system, partial(study.mean, kind=kind, group=group))
    return found.text() if found else OUTSIDE


def every(study: Study) -> str:
    """Return a row for each system and η."""
    names = [(START, 0.0), *CELLS, *CONTROLS]
    rows = []
    for system, eta in names:
        cells = [study.of[s, system, eta] for s in study.seeds if (s, system, eta) in study.of]
        if cells:
            rows.append([label(system), f"{eta:g}" if eta else "", *_numbers(study, cells)])
    head = ["system", "η", "seeds", "iterations", "mean price", "KL", "gold", "proxy"]
    groups = [f"gold by {kind}" for kind in (SOURCES, DIFFICULTY)]
    rest = ["tokens", "finished", "refusals", "win / tie / lose", "length-controlled"]
    return markdown_table([*head, *groups, *rest], rows)


def _numbers(study: Study, cells: Sequence[Cell]) -> list[str]:
    def mean(name: str) -> float:
        return float(np.mean([np.mean(getattr(cell, name)) for cell in cells]))

    groups = []
    for kind in (SOURCES, DIFFICULTY):
        found: dict[str, list[float]] = {}
        for cell in cells:
            for name in study.groups(cell.seed, kind):
                found.setdefault(name, []).append(float(study.mean(cell, kind, name)[0]))
        groups.append(", ".join(f"{name} {np.mean(x):.3f}" for name, x in found.items()))
    return [
        str(len(cells)),
        str(cells[0].iterations),
        f"{np.mean([cell.price for cell in cells]):.3f}",
        f"{mean('kl'):.2f}",
        f"{mean('gold'):.3f}",
        f"{mean('proxy'):.3f}",
        *groups,
        f"{mean('tokens'):.0f}",
        f"{mean('finished'):.2f}",
        f"{mean('refuses'):.2f}",
        *_against(study, cells),
    ]


def _against(study: Study, cells: Sequence[Cell]) -> list[str]:
    found = [x for cell in cells if (x := study.against_baseline(cell)) is not None]
    if not found:
        return ["", ""]
    shares = [np.mean([x[name] / x["n"] for x in found]) for name in ("win", "tie", "lose")]
    rates = [x["length_controlled_win"] for x in found if x["length_controlled_win"] is not None]
    counts = " / ".join(f"{share:.2f}" for share in shares)
    return [counts, f"{np.mean(rates):.2f}" if rates else "not identified"]
