"""One run: recipe -> objects -> loop { step; log; evaluate; save }, with resume, alerts and an
orderly end."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gipo_megatron.environment import commit, emit
from gipo_megatron.errors import SamplerLost, UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.mesh import Mesh, mesh_session
from gipo_megatron.megatron.watch import Phases
from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.recipe.length import rows_a_step
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.roles import Stateful
from gipo_megatron.telemetry.console import Display
from gipo_megatron.telemetry.loggers import make_sinks
from gipo_megatron.telemetry.metrics import PhaseTimer, memory_metrics, reduce_metrics
from gipo_megatron.telemetry.performance import performance
from gipo_megatron.telemetry.sinks import Sink
from gipo_megatron.training import run_folder
from gipo_megatron.training.assembly import Assembly, assemble
from gipo_megatron.training.interrupt import Interrupt
from gipo_megatron.training.run_lock import RunLock
from gipo_megatron.types import StepResult
from gipo_megatron.weights.checkpoints import CheckpointMeta, latest, read_meta
from gipo_megatron.weights.sources import check_tokenizer


@dataclass
class Progress:
    """The loop's own state, kept over a restart."""

    step: int = 0  # iterations done
    best: float | None = None  # best held-out gold, score, accuracy or -loss so far
    judged_by: str = ""  # its metric
    best_step: int = 0  # its step
    stale: int = 0  # evaluations since then
    skipped: int = 0  # consecutive steps with a non-finite loss or gradient
    data: str = ""  # fingerprint of the training rows
    held_out_data: str = ""  # that of the held-out rows
    # of the last step, until its evaluation is done: values, samples, skipped
    unlogged: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key in vars(self).keys() & state.keys():
            setattr(self, key, state[key])


def train(recipe: Recipe) -> None:
    """Run a whole recipe. Collective: every rank calls it. Raises UserError for what the user can
    correct."""
    with mesh_session(recipe.parallel, recipe.run.seed, recipe.precision.deterministic) as mesh:
        train_on(mesh, recipe)


def train_on(mesh: Mesh, recipe: Recipe) -> None:
    """Run a recipe on an existing mesh; several runs may follow each other in one world."""
    directory = Path(recipe.run.dir)
    start_from = find_checkpoint(recipe, directory)
    if start_from is not None and is_complete(recipe, directory, start_from):
        if mesh.is_main:
            run_folder.announce_complete(recipe, start_from)
        return
    interrupt = Interrupt()
    sinks: list[Sink] = [Phases()]

    def show(phase: str) -> None:
        for sink in sinks:
            sink.phase(phase)

    with RunLock(directory) as lock, ExitStack() as closing:
        try:
            mesh.from_main(lock.take)
            # again: a run that held the lock may have written since
            start_from = find_checkpoint(recipe, directory)
            timer = PhaseTimer(show)
            parts = assemble(recipe, mesh, timer.phase, timer.count, closing)
            # mcore collects garbage at every save; objects that stay need not be visited each time
            gc.freeze()
            Run(recipe, mesh, parts, sinks, timer, interrupt, directory).run(start_from)
        finally:
            for sink in sinks:
                sink.close()
            interrupt.restore()
            gc.unfreeze()


def find_checkpoint(recipe: Recipe, directory: Path) -> Path | None:
    """Return the checkpoint that `run.resume` continues from; None: start at the beginning."""
    resume = recipe.run.resume
    if resume == "auto":
        return latest(directory / "checkpoints")
    if resume == "never":
        if (directory / "metrics.jsonl").exists():
            raise UserError(
                f"{directory} holds a run already",
                where="run.resume: never",
                fix="choose another run.dir, or run.resume=auto",
            )
        return None
    read_meta(Path(resume))
    return Path(resume)


def is_complete(recipe: Recipe, directory: Path, newest: Path) -> bool:
    """Return whether the last step is done and `final` is its checkpoint."""
    run, final, meta = recipe.run, directory / "final", read_meta(newest)
    if run.steps is not None:
        done = meta.step >= run.steps
    else:
        done = run.epochs is not None and meta.epochs >= run.epochs
    return done and final.exists() and final.samefile(newest)


@dataclass
class Run:
    recipe: Recipe
    mesh: Mesh
    parts: Assembly
    sinks: list[Sink]  # rank 0's are filled when the run begins
    timer: PhaseTimer
    interrupt: Interrupt
    directory: Path
    progress: Progress = field(default_factory=Progress)

    def run(self, start_from: Path | None) -> None:
        run, steps, progress = self.recipe.run, self.parts.steps, self.progress
        self._resume(start_from)
        origin = f"resumed from {start_from}" if start_from is not None else "started"
        self.mesh.from_main(partial(self._begin, origin))
        if run.eval_every and progress.step == 0:
            evaluated, responses = self._evaluate()
            self._log(0, evaluated, held_out=responses)
        self.timer.metrics()  # the set-up is no part of the first step
        ending = "" if progress.unlogged or progress.step < steps else "complete"
        while not ending:
            try:
                if not progress.unlogged:
                    self._step()
                ending = self._account()
            except SamplerLost:  # the step, or its evaluation, can be done again from here
                if progress.step:
                    self._save(best=False)
                raise
        self._end(ending)

    def _step(self) -> None:
        """Run one iteration; its row of the log is complete after `_account`."""
        progress = self.progress
        result = self.parts.algorithm.step(progress.step)
        progress.step += 1
        progress.unlogged = {
            "values": self._values(result),
            "samples": result.samples,
            "skipped": result.skipped,
        }

    def _account(self) -> str:
        """Evaluate, watch, log and save after a step; return why the run ends, or ""."""
        run, progress = self.recipe.run, self.progress
        row = progress.unlogged
        held_out: list[dict[str, Any]] = []
        improved = False
        last = progress.step == self.parts.steps
        if run.eval_every and (progress.step % run.eval_every == 0 or last):
            evaluated, held_out = self._evaluate()
            improved = self._judge(evaluated)
            row["values"] |= evaluated
        progress.unlogged = {}
        self._watch(row["values"], row["skipped"])
        ending = self._ending(row["values"], row["skipped"])
        self._log(progress.step, row["values"], samples=row["samples"], held_out=held_out)
        if ending or improved or (run.save_every and progress.step % run.save_every == 0):
            self._save(best=improved)
        self.timer.metrics()  # evaluations and checkpoints are no part of the next step
        return ending

    # -------------------------------------------------------------------------------------- numbers

    def _values(self, result: StepResult) -> dict[str, float]:
        """Return one row of the log: metrics over all replicas, times, memory, speed."""
        metrics: Metrics = {
            **result.metrics,
            **self.timer.metrics(),
            **memory_metrics(),
            "perf/tokens": Metric.sum(result.tokens),
        }
        values = reduce_metrics(metrics, self.mesh.data_parallel)
        tokens = values.pop("perf/tokens")
        architecture, sequences = self.recipe.model.architecture, self.parts.sequences_per_step
        return values | performance(
            values, architecture, tokens, result.forward_equivalents, sequences, self.mesh.world
        )

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        with self.timer.phase("held_out"):
            metrics, samples = self.parts.algorithm.evaluate()
        return run_folder.with_interval(reduce_metrics(metrics, self.mesh.data_parallel)), samples

    def _judge(self, held_out: Mapping[str, float]) -> bool:
        """Return whether this evaluation is the best so far, by the first of JUDGED_BY it has."""
        progress = self.progress
        metric, sign = next(((m, s) for m, s in run_folder.JUDGED_BY if m in held_out), ("", 1))
        figure = sign * held_out.get(metric, math.nan)
        if metric != progress.judged_by:  # a resumed run that has another scorer now
            progress.judged_by, progress.best = metric, None
        if math.isnan(figure) or (progress.best is not None and figure <= progress.best):
            progress.stale += 1
            return False
        progress.best, progress.best_step, progress.stale = figure, progress.step, 0
        return True

    def _watch(self, values: Mapping[str, float], skipped: Mapping[str, tuple[int, ...]]) -> None:
        progress = self.progress
        messages = self.recipe.alerts.check(values, progress.step)
        progress.skipped = progress.skipped + 1 if skipped else 0
        for what, rows in skipped.items():
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            shown = ", ".join(map(str, rows[:8]))
            messages.append(f"step {progress.step}: {what}; rows {shown}{more}")
        for sink in self.sinks:
            for message in messages:
                sink.alert(progress.step, message)

    def _log(self, step: int, values: Mapping[str, float], **responses: list[Any]) -> None:
        """Write a row of the log, and responses by their kind: samples, held_out."""
        for sink in self.sinks:
            sink.log(step, values)
            for kind, rows in responses.items():
                if rows:
                    sink.samples(step, rows, kind)

    # ---------------------------------------------------------------------------------- how it ends

    def _ending(self, values: Mapping[str, float], skipped: Iterable[str]) -> str:
        """Return why the run ends after this step; empty: it goes on. The same on every rank."""
        run, progress = self.recipe.run, self.progress
        if progress.skipped >= run.max_skipped:
            raise UserError(
                f"{progress.skipped} steps in a row had a number that is not finite (step"
                f" {progress.step}: {'; '.join(skipped)}; rows in alerts.jsonl)",
                where=(
                    "the last good checkpoint is"
                    f" {latest(self.directory / 'checkpoints') or 'none yet'}"
                ),
                fix=(
                    "lower the learning rate, look at those rows, or use precision.dtype=fp32; then"
                    " start again, it resumes"
                ),
            )
        if self.mesh.any(bool(self.interrupt.name)):
            return f"interrupted ({self.interrupt.name or 'on another rank'})"
        if run.stop.kl_above is not None and values.get("kl/mean", 0.0) > run.stop.kl_above:
            return f"kl/mean {values['kl/mean']:.4g} > run.stop.kl_above {run.stop.kl_above:g}"
        if run.stop.score_patience is not None and progress.stale >= run.stop.score_patience:
            return (
                f"no better held-out score in {progress.stale} evaluations"
                " (run.stop.score_patience)"
            )
        return "complete" if progress.step >= self.parts.steps else ""

    def _end(self, ending: str) -> None:
        """Write links, figures, the Hugging Face folder, the last line. An interrupted run gets no
        `final`."""
        last = self.directory / "checkpoints" / f"step_{self.progress.step}"
        done = not ending.startswith("interrupted")
        if done and self.recipe.run.export_hf:
            self._export()
        if not self.mesh.is_main:
            return
        for sink in self.sinks:
            sink.close()
        self.sinks.clear()
        if done:  # `final` is the last: a run without it ends once more
            run_folder.close_run(self.directory, self.recipe)
            checkpoint.link(self.directory / "final", last)
        advice = "" if done else "; the same command continues"
        emit(
            f"{self.recipe.name}: {ending} at step {self.progress.step} of {self.parts.steps};"
            f" {last}{advice}",
            error=False,
        )

    def _export(self) -> None:
        """Write RUN/hf: the policy, or the reward model. Collective."""
        # imported here: it takes seconds, and most runs export nothing
        from gipo_megatron.conversion.export import export_run

        role, engine = next(iter(self.parts.trained.items()))
        shown = Display(self.mesh.is_main and "console" in self.recipe.run.loggers)
        export_run(self.directory / "hf", role, engine, self.parts.tokenizer, self._meta(), shown)

    # ---------------------------------------------------------------------------------- checkpoints

    def _save(self, best: bool) -> None:
        with self.timer.phase("save"):
            folder, algorithm = self.directory / "checkpoints", self.parts.algorithm
            state = {
                "progress": self.progress.state_dict(),
                "algorithm": algorithm.state_dict() if isinstance(algorithm, Stateful) else {},
                "alerts": self.recipe.alerts.state_dict(),
            }
            checkpoint.save(
                folder,
                self.parts.trained,
                self.mesh,
                self._meta(),
                state,
                self._extra_files,
                self.recipe.run.keep,
                self.directory / "best" if best else None,
            )

    def _meta(self) -> CheckpointMeta:
        """Step and origin of a checkpoint written now."""
        recipe, tokenizer, step = self.recipe, self.parts.tokenizer, self.progress.step
        return CheckpointMeta(
            step=step,
            epochs=step * rows_a_step(recipe) / len(self.parts.train),
            recipe=recipe.name,
            hub=recipe.model.hub,
            commit=commit(),
            parallel=vars(recipe.parallel),
            tokenizer=tokenizer.fingerprint,
            chat_template=tokenizer.chat_template,
            template=recipe.data.template,
            style=self.parts.train.rows[0].style,
        )

    def _extra_files(self, folder: Path) -> None:
        """Write the tokenizer and the recipe: a checkpoint is complete in itself."""
        self.parts.tokenizer.save(folder / "tokenizer")
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _resume(self, path: Path | None) -> None:
        rows, held_out = self.parts.train.fingerprint, self.parts.held_out.fingerprint
        if path is not None:
            self.parts.notes += check_tokenizer(
                path, self.parts.tokenizer, self.recipe.data.template, where="model.tokenizer"
            )
            state = checkpoint.restore(path, self.parts.trained, self.mesh)
            self.progress.load_state_dict(state["progress"])
            if isinstance(self.parts.algorithm, Stateful):
                self.parts.algorithm.load_state_dict(state["algorithm"])
            self.recipe.alerts.load_state_dict(state["alerts"])
            if self.progress.data != rows:
                what = f"the training data differ from those of {path}"
                fix = "the same data; or a new run.dir, and models.<role>.load: that checkpoint"
                raise UserError(what, where="data", fix=fix)
            if self.progress.held_out_data != held_out:
                self.progress.best = None
                self.parts.notes.append(f"other held-out rows than at {path}: `best` begins again")
        self.progress.data, self.progress.held_out_data = rows, held_out

    def _begin(self, origin: str) -> None:
        """Begin to write: all is built and loaded, and only now the run folder changes. Rank 0
        only."""
        recipe, directory, step = self.recipe, self.directory, self.progress.step
        run_folder.open_run(recipe, directory)
        checkpoint.discard_after(directory / "checkpoints", step)
        if step < self.parts.steps:
            (directory / "final").unlink(missing_ok=True)
        best = directory / "checkpoints" / f"step_{self.progress.best_step}"
        if best.is_dir():
            checkpoint.link(directory / "best", best)
        else:
            (directory / "best").unlink(missing_ok=True)
        checkpoint.prune(directory / "checkpoints", recipe.run.keep)
        self.sinks += make_sinks(
            recipe.run.loggers,
            directory,
            self.parts.steps,
            name=recipe.name,
            headline=self.parts.algorithm.headline,
            config=run_folder.plain_recipe(recipe),
        )
        for sink in self.sinks:
            sink.resume(step)
        run_folder.announce(
            recipe, self.mesh.world, origin, self.parts.train, self.parts.held_out, self.parts.notes
        )
