"""Study S4: SmolLM2-135M on Anthropic HH, judged by gold reward models on test prompts.

python tools/study.py s4 [minutes=12] [steps=100] [seeds=3] [rm_epochs=2] [out=runs/s4]
                         [docs=FOLDER] [train=false] [RECIPE.KEY=VALUE …]

Needs a GPU, SmolLM2 (tools/fetch_smollm.py runs/smollm2) and HH; model.hub=FOLDER and
data.path=FOLDER name others. All words with a dot, and with=…, go to every recipe; rm:KEY=VALUE to
those of the reward models alone, ppo:KEY=VALUE to those of the policies.

A seed trains a proxy reward model and three gold ones, then one policy for each cell. The first
iterations are timed, and from then on every cell has as many iterations as the minutes allow; a
cell for which the time is too short is not begun. Each finished cell is a line of OUT/cells.jsonl.
The same command continues: with the next cell where the seed's models are in OUT, else, as on a
fresh machine with a copy of OUT's .jsonl and .json files, with the next seed. Tables and figure go
to OUT after each start, and to FOLDER from three seeds on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.files import append_jsonl, write_json, write_text
from gipo_megatron.megatron.mesh import Mesh, mesh_session
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Parallel
from tools.gpu.runs import RECIPES
from tools.studies.s4_cells import (
    AGAIN,
    CELLS,
    CONTROLS,
    START,
    Cell,
    Models,
    load_cells,
    load_models,
)
from tools.studies.s4_compare import Study
from tools.studies.s4_figure import draw
from tools.studies.s4_models import GOLD, PROXY, Chain, Judge, seconds_per_iteration
from tools.studies.s4_tables import page

STOP = 0.55  # the gold ensemble's lower bound of accuracy at or below which nothing is trained
TIMED = 4  # iterations after the critic's warm-up that are timed
FIRST = 4  # cells of the first seed that should fit into the minutes
LEAST = 40  # iterations of a cell; where they do not fit, there are fewer cells
PUBLISHED = 3  # seeds
NUMBERS = {"minutes": 0, "steps": 1, "seeds": 1, "rm_epochs": 1}  # and the least that they may be


@dataclass(frozen=True)
class Options:
    minutes: int = 12
    steps: int = 100  # iterations of a cell at most
    seeds: int = 3
    rm_epochs: int = 2  # of the reward models, each over its part
    out: Path = Path("runs/s4")
    docs: Path | None = None
    train: bool = True
    words: tuple[str, ...] = ()

    @property
    def cells(self) -> Path:
        return self.out / "cells.jsonl"

    @property
    def models(self) -> Path:
        return self.out / "models.jsonl"


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError for an unknown option, and for a number that is not one."""
    found: dict[str, Any] = {}
    words = []
    for word in argv:
        key, _, text = word.partition("=")
        if key in NUMBERS and text.isdigit() and int(text) >= NUMBERS[key]:
            found[key] = int(text)
        elif key in ("out", "docs") and text:
            found[key] = Path(text)
        elif key == "train" and text in ("true", "false"):
            found[key] = text == "true"
        elif text and ("." in key or key == "with"):
            words.append(word)
        else:
            raise UserError(
                f"cannot use {word!r}",
                where="command line",
                fix="minutes=N steps=N seeds=N rm_epochs=N out=FOLDER docs=FOLDER train=true|false,"
                " and recipe keys such as data.path=FOLDER",
            )
    return Options(**found, words=tuple(words))


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    if options.train:
        with mesh_session(Parallel()) as mesh:
            Session(options, mesh).run()
    publish(options)


# ------------------------------------------------------------------------------------ what fits


@dataclass(frozen=True)
class Plan:
    """Iterations of every cell of a folder, and the seconds that they were expected to take."""

    iterations: int
    per_iteration: float
    per_cell: float  # models built, responses drawn and scored

    @property
    def seconds(self) -> float:
        return self.iterations * self.per_iteration + self.per_cell


def planned(left: float, per_iteration: float, per_cell: float, steps: int) -> Plan:
    """Return `steps` iterations a cell where FIRST cells then fit into `left` seconds, else as many
    as fit, but LEAST."""
    fit = int((left / FIRST - per_cell) / per_iteration)
    return Plan(min(steps, max(fit, LEAST)), per_iteration, per_cell)


# ----------------------------------------------------------------------------------- the session


@dataclass
class Session:
    """One start of the command."""

    options: Options
    mesh: Mesh
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.begun + 60 * self.options.minutes - time.monotonic()

    def run(self) -> None:
        """Train what is missing and fits, all seeds' cells before any seed's controls."""
        for cells in (CELLS, CONTROLS):
            for seed in range(self.options.seeds):
                if not self._seed(seed, cells):
                    return

    def _seed(self, seed: int, cells: Sequence[tuple[str, float]]) -> bool:
        """Return False where the time is over, or the stop rule ends the study."""
        known = load_models(self.options.models).get(seed)
        missing = [cell for cell in cells if (seed, *cell) not in self._done()]
        folder = self.options.out / f"seed_{seed}"
        if known and known.gold.low <= STOP:
            return False
        if not missing:
            return True
        if known and not (folder / GOLD[-1] / "final").exists():
            print(f"seed {seed}: its reward models are not in {folder}; the next seed", flush=True)
            return True
        before = [] if known else self._models()[-1:]
        if not self._fits(sum(models.seconds for models in before)):
            return False
        chain = Chain(self.mesh, folder, seed, self.options.words, self.options.rm_epochs)
        judge = self._prepared(chain, known)
        return judge is not None and all(self._cell(chain, judge, *cell) for cell in missing)

    def _done(self) -> set[tuple[int, str, float]]:
        return {cell.key for cell in load_cells(self.options.cells)}

    def _models(self) -> list[Models]:
        return list(load_models(self.options.models).values())

    def _fits(self, more: float = 0.0) -> bool:
        plan = self._plan()
        seconds = more + (plan.seconds if plan else 0.0)
        if seconds < self.left:
            return True
        print(f"stopped: {seconds:.0f} s are expected, {self.left:.0f} s are left", flush=True)
        return False

    def _plan(self) -> Plan | None:
        file = self.options.out / "plan.json"
        return Plan(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    # -------------------------------------------------------------------------------- reward models

    def _prepared(self, chain: Chain, known: Models | None) -> Judge | None:
        """Train and measure a seed's reward models; None where the stop rule ends the study."""
        began = time.monotonic()
        for name in (PROXY, *GOLD):
            chain.reward_model(name)
        judge = Judge(chain)
        if known is None:
            known = judge.accuracies(time.monotonic() - began)
            append_jsonl(self.options.models, [asdict(known)], sync=True)
        for name, found in (("proxy", known.proxy), ("gold", known.gold)):
            print(
                f"seed {chain.seed}: {name} prefers the chosen response of {found.share:.3f}"
                f" [{found.low:.3f}, {found.high:.3f}] of {found.pairs} test pairs",
                flush=True,
            )
        if known.gold.low <= STOP:
            print(f"stopped: the gold models' lower bound is not above {STOP}", flush=True)
            return None
        return judge

    # ------------------------------------------------------------------------------------- policies

    def _cell(self, chain: Chain, judge: Judge, system: str, eta: float) -> bool:
        """Return False where the time is too short for the cell."""
        for name in (START, AGAIN):
            if (chain.seed, name, 0.0) not in self._done():
                self._record(judge.answered(name, 0.0, chain.start, []))
        plan = self._plan() or self._timed(chain, judge, system, eta)
        if not self._fits():
            return False
        rows = chain.policy(system, eta, plan.iterations)
        name = f"{system}_{eta:g}"
        self._record(judge.answered(system, eta, chain.final(name), rows))
        shutil.rmtree(chain.folder / name / "checkpoints")  # gigabytes a cell
        print(f"seed {chain.seed}: {name} is done, {self.left:.0f} s are left", flush=True)
        return True

    def _timed(self, chain: Chain, judge: Judge, system: str, eta: float) -> Plan:
        """Run the first iterations of a cell, which goes on from there; write the plan."""
        options = self.options
        words = chain.policy_words(system, eta, options.steps)
        recipe = compose([*words, f"run.dir={chain.folder}"], RECIPES)
        warm = min(recipe.algorithm["critic_warmup"], options.steps - 1)
        began = time.monotonic()
        rows = chain.policy(system, eta, min(warm + TIMED, options.steps))
        trained = time.monotonic()
        judge.answered(START, 0.0, chain.start, [])
        inside = sum(row["time/step_seconds"] for row in rows)
        per_cell = time.monotonic() - trained + max(0.0, trained - began - inside)
        plan = planned(self.left, seconds_per_iteration(rows, warm), per_cell, options.steps)
        write_json(options.out / "plan.json", asdict(plan))
        print(
            f"{plan.per_iteration:.2f} s an iteration, {plan.per_cell:.0f} s beside them:"
            f" {plan.iterations} iterations a cell",
            flush=True,
        )
        return plan

    def _record(self, cell: Cell) -> None:
        append_jsonl(self.options.cells, [asdict(cell)], sync=True)


# --------------------------------------------------------------------------------------- the pages


def publish(options: Options) -> None:
    """Write the tables and the figure to OUT, and to `docs` with PUBLISHED complete seeds.

    Raises UserError where nothing was run, and for `docs` with fewer seeds.
    """
    models, cells = load_models(options.models), load_cells(options.cells)
    if not models:
        fix = "start without train=false"
        raise UserError("no reward model has been trained", where=str(options.out), fix=fix)
    study = Study(cells)
    _write(options.out, study, models)
    if options.docs is None:
        return
    if len(study.complete) < PUBLISHED:
        raise UserError(
            f"{len(study.complete)} complete seeds; {PUBLISHED} are published",
            where="docs",
            fix=f"train more; {options.out} has the tables of what there is",
        )
    _write(options.docs, study, models)


def _write(folder: Path, study: Study, models: Mapping[int, Models]) -> None:
    write_text(folder / "s4_tables.md", page(study, list(models.values()), STOP, PUBLISHED))
    if study.seeds:
        draw(folder / "s4.svg", study)
    print(f"wrote {folder / 's4_tables.md'}", flush=True)
