"""Study S3: train the planted language world's cells, then write the tables and the figure."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from gipo_megatron.errors import UserError
from gipo_megatron.files import append_jsonl, read_jsonl, write_text
from tools.studies.chains import Job, run_all
from tools.studies.compare import findings
from tools.studies.curves import Cell, curve_of
from tools.studies.options import Options
from tools.studies.s3_figure import draw
from tools.studies.s3_report import RULE, as_world, csv, default_classifier, page

EVERY = 10  # iterations between evaluations
# one micro-batch is faster on a CPU
LIGHT = ("run.save_every=0", "run.keep=1", "run.loggers=[]", "batch.micro_batch=32")
SFT = ("recipe=tiny/sft", *LIGHT)
RM = ("recipe=tiny/rm", *LIGHT)
# Held-out responses are drawn from the policy whose KL is measured.
POLICY = (
    *LIGHT, f"run.eval_every={EVERY}", "run.eval_prompts=180",
    "evaluation.temperature=1", "evaluation.top_p=1",
)  # fmt: skip


@dataclass(frozen=True)
class System:
    label: str
    etas: tuple[float, ...]
    recipe: str = "tiny/gipo"
    overrides: tuple[str, ...] = ()


CLASSIFIER = "algorithm.group_classifier.name="
SYSTEMS = {
    "ppo_kl": System("PPO with KL", (0.0, 0.1, 0.2, 0.35, 0.6), "tiny/ppo_kl"),
    "gipo_head": System("GIPO, learned head", (0.35,)),
    "gipo_value": System(
        "GIPO, value split", (0.35,), overrides=(CLASSIFIER + "value_split",)
    ),
    "adaptive": System(
        "adaptive KL alone", (0.35,),
        overrides=(CLASSIFIER + "value_split", "algorithm.variance_regulariser.name=none"),
    ),
    "gipo_shared": System(
        "GIPO, shared price", (0.35,),
        overrides=("algorithm.variance_regulariser.weigh_kl=true",),
    ),
    "oracle": System("GIPO, given groups", (0.35,), overrides=(CLASSIFIER + "labelled",)),
    "random": System("GIPO, random groups", (0.35,), overrides=(CLASSIFIER + "random",)),
}  # fmt: skip


def cells_of(seed: int, steps: int) -> list[Cell]:
    """Return the cells of a seed in the order of training, without curves."""
    return [
        Cell(
            seed, name, eta,
            [
                f"recipe={system.recipe}", *POLICY, *system.overrides,
                f"algorithm.kl_controller.eta={eta}", f"run.steps={steps}", f"run.seed={seed}",
            ],
            {},
        )
        for name, system in SYSTEMS.items()
        for eta in system.etas
    ]  # fmt: skip


def load(file: Path, seeds: int, steps: int) -> list[Cell]:
    """Return the finished cells with these settings."""
    wanted = [key(cell) for seed in range(seeds) for cell in cells_of(seed, steps)]
    cells = {key(cell): cell for cell in (Cell(**row) for _, row in read_jsonl(file))}
    return [cells[k] for k in wanted if k in cells]


def key(cell: Cell) -> tuple[str, ...]:
    return cell.system, *cell.words


def train(options: Options) -> None:
    """Train every cell that OUT/cells.jsonl lacks, seed by seed. Raises UserError when runs
    failed."""
    file = options.out / "cells.jsonl"
    done = {key(cell) for cell in load(file, options.seeds, options.steps)}
    jobs: list[Job] = []
    cell_of: dict[Job, Cell] = {}
    for seed in range(options.seeds):
        missing = [cell for cell in cells_of(seed, options.steps) if key(cell) not in done]
        stages = chain(options.out / f"seed{seed}", seed)
        jobs += [job for job in stages if missing and not job.complete]
        sft, rm = (job.folder for job in stages)
        for cell in missing:
            name = f"{cell.system}_{cell.eta:g}"
            loads = (f"models.actor.load={sft}/final", f"models.reward.load={rm}/final")
            job = Job(f"seed {seed} {name}", rm.parent / name, (*cell.words, *loads), (sft, rm))
            cell_of[job] = cell
            jobs.append(job)

    failed = run_all(jobs, options.workers, partial(_ended, cell_of, file))
    if failed:
        raise UserError(
            f"{len(failed)} runs did not finish: {', '.join(job.name for job in failed)}",
            where=str(options.out),
            fix="see their .log files; the same command starts them again",
        )


def chain(folder: Path, seed: int) -> tuple[Job, Job]:
    """Return the SFT run of a seed and the reward model's."""
    sft, rm, number = folder / "sft", folder / "rm", f"run.seed={seed}"
    return (
        Job(f"seed {seed} sft", sft, (*SFT, number)),
        Job(f"seed {seed} rm", rm, (*RM, number, f"models.reward.load={sft}/final"), (sft,)),
    )


def _ended(cell_of: dict[Job, Cell], file: Path, job: Job) -> None:
    """Write the cell, then delete all of the run but its metrics."""
    if job in cell_of:
        cell = cell_of[job]
        curve = curve_of(job.folder, EVERY)
        append_jsonl(file, [asdict(cell) | {"curve": curve}], sync=True)
        for path in job.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "metrics.jsonl":
                path.unlink()
    print(f"{job.name}: done", flush=True)


def whole_seeds(cells: Sequence[Cell], steps: int) -> list[Cell]:
    """Return the cells of the seeds that have all of theirs."""
    count = Counter(cell.seed for cell in cells)
    return [cell for cell in cells if count[cell.seed] == len(cells_of(cell.seed, steps))]


def main(options: Options) -> None:
    """Write s3_tables.md, s3.svg and s3.csv to `docs`; raises UserError without two whole seeds."""
    if options.train:
        train(options)
    file, steps, docs = options.out / "cells.jsonl", options.steps, options.docs
    cells = whole_seeds(load(file, options.seeds, steps), steps)
    seeds = sorted({cell.seed for cell in cells})
    if len(seeds) < 2:
        raise UserError(
            f"{len(seeds)} seeds have all their cells with steps={steps}; an interval needs two",
            where=str(file),
            fix="start without train=false, or with the same seeds= and steps=",
        )
    world, labels = as_world(cells), {name: system.label for name, system in SYSTEMS.items()}
    found, chosen = findings([world], RULE), default_classifier(world)
    setting = (
        f"Written by `python tools/study.py s3 seeds={options.seeds} steps={steps}`:"
        f" {len(seeds)} seeds × {steps} iterations, {len(cells)} cells (seed × system × η)."
    )
    write_text(docs / "s3_tables.md", page(world, found, labels, setting))
    write_text(docs / "s3.csv", csv(cells))
    draw(docs / "s3.svg", world, cells, labels, chosen)
    for finding in found:
        print(f"{labels[finding.system]}: {finding.verdict}")
    print(f"default by the rule: {labels[chosen]}")
