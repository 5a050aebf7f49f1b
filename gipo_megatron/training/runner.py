"""One run: recipe -> objects -> loop { step; log; evaluate; save }, with resume, alerts and an
orderly end."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.roles import Stateful
from gipo_megatron.telemetry.console import Display
from gipo_megatron.telemetry.metrics import PhaseTimer, memory_metrics, reduce_metrics
from gipo_megatron.telemetry.performance import performance
from gipo_megatron.telemetry.sinks import Sink, make_sinks
from gipo_megatron.training import run_folder
from gipo_megatron.training.assembly import Assembly, assemble
from gipo_megatron.types import StepResult
from gipo_megatron.weights.sources import check_tokenizer

# seconds; torchrun forwards a terminal's Ctrl-C, so every worker sees one press twice
REPEATED_SIGNAL = 2.0


class Interrupt:
    """SIGTERM, SIGUSR1 and the first Ctrl-C: finish the step, checkpoint, end. A second Ctrl-C
    stops at once."""

    def __init__(self) -> None:
        self.name = ""
        self._pressed = -math.inf
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.name and now - self._pressed > REPEATED_SIGNAL:
                raise KeyboardInterrupt
            self._pressed = now
        self.name = self.name or signal.Signals(number).name


@dataclass
class Progress:
    """What the loop itself remembers over a restart."""

    step: int = 0  # iterations done
    best: float | None = None  # best held-out figure so far
    best_step: int = 0  # and where
    stale: int = 0  # evaluations since
    skipped: int = 0  # consecutive steps with a non-finite loss or gradient
    data: str = ""  # fingerprint of the training rows

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def train(recipe: Recipe) -> None:
    """The whole run a recipe describes. Collective: every rank calls it. Raises UserError for what
    the user can mend."""
    mesh = Mesh.create(recipe.parallel, recipe.run.seed, recipe.precision.deterministic)
    try:
        train_on(mesh, recipe)
    except UserError as error:
        mesh.report(str(error))
        raise
    # a rank that stops breaks its connections: the others would show those, not the reason
    except Exception:
        if reason := mesh.reported():
            raise UserError(reason) from None
        raise
    finally:
        mesh.close()


def train_on(mesh: Mesh, recipe: Recipe) -> None:
    """The same on a mesh that is there; several runs may follow each other in one world."""
    interrupt = Interrupt()
    sinks: list[Sink] = []
    try:
        directory = Path(recipe.run.dir)
        start_from = find_checkpoint(recipe, directory)
        if start_from is not None and is_complete(recipe, directory, start_from):
            if mesh.is_main:
                print(
                    f"{recipe.name}: complete already, {start_from}; a larger run.steps"
                    " continues it",
                    flush=True,
                )
                if recipe.run.export_hf and not (directory / "hf").exists():
                    print(
                        "  its Hugging Face folder: tools/megatron_to_hf.py"
                        f" checkpoint={directory}/final out={directory}/hf",
                        flush=True,
                    )
            return
        if mesh.is_main:
            run_folder.check_writable(directory)

        def show(phase: str) -> None:
            for sink in sinks:
                sink.phase(phase)

        timer = PhaseTimer(show)
        parts = assemble(recipe, mesh, timer.phase)
        # mcore collects garbage at every save; what is there to stay need not be walked through
        # each time
        gc.freeze()
        Run(recipe, mesh, parts, sinks, timer, interrupt, directory).run(start_from)
    finally:
        for sink in sinks:
            sink.close()
        interrupt.restore()
        gc.unfreeze()


def find_checkpoint(recipe: Recipe, directory: Path) -> Path | None:
    """Where `run.resume` says to continue from; None: at the beginning."""
    resume = recipe.run.resume
    if resume == "auto":
        return checkpoint.latest(directory / "checkpoints")
    if resume == "never":
        if (directory / "metrics.jsonl").exists():
            raise UserError(
                f"{directory} holds a run already",
                where="run.resume: never",
                fix="choose another run.dir, or run.resume=auto",
            )
        return None
    checkpoint.read_meta(Path(resume))
    return Path(resume)


def is_complete(recipe: Recipe, directory: Path, newest: Path) -> bool:
    """Whether there is nothing left to do: the last step is done, and `final` is its checkpoint."""
    final = directory / "final"
    return (
        checkpoint.read_meta(newest)["step"] >= recipe.run.steps
        and final.exists()
        and final.samefile(newest)
    )


@dataclass
class Run:
    recipe: Recipe
    mesh: Mesh
    parts: Assembly
    sinks: list[Sink]  # rank 0 only; filled when the run begins
    timer: PhaseTimer
    interrupt: Interrupt
    directory: Path
    progress: Progress = field(default_factory=Progress)

    def run(self, start_from: Path | None) -> None:
        run, progress = self.recipe.run, self.progress
        self._resume(start_from)
        if self.mesh.is_main:
            self._begin(f"resumed from {start_from}" if start_from is not None else "started")
        if run.eval_every and progress.step == 0:
            values, samples = self._evaluate()
            self._log(0, values, samples)
        self.timer.metrics()  # nor is the set-up of the first
        ending = "" if progress.step < run.steps else "complete"
        while not ending:
            result = self.parts.algorithm.step(progress.step)
            progress.step += 1
            values, samples = self._values(result), result.samples
            improved = False
            if run.eval_every and (
                progress.step % run.eval_every == 0 or progress.step == run.steps
            ):
                held_out, _ = self._evaluate()
                improved = self._judge(held_out)
                values |= held_out
            self._watch(values, result)
            ending = self._ending(values)
            self._log(progress.step, values, samples)
            if ending or improved or (run.save_every and progress.step % run.save_every == 0):
                self._save(best=improved)
            self.timer.metrics()  # evaluations and checkpoints are no part of the next step
        self._end(ending)

    # -------------------------------------------------------------------------------------- numbers

    def _values(self, result: StepResult) -> dict[str, float]:
        """One row of the log: the step's metrics over all replicas, times, memory, speed."""
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
        """Whether this evaluation is the best so far: score or accuracy up, or loss down."""
        figure = next(
            (sign * held_out[name] for name, sign in run_folder.JUDGED_BY if name in held_out),
            math.nan,
        )
        if math.isnan(figure) or (self.progress.best is not None and figure <= self.progress.best):
            self.progress.stale += 1
            return False
        self.progress.best, self.progress.best_step, self.progress.stale = (
            figure,
            self.progress.step,
            0,
        )
        return True

    def _watch(self, values: Mapping[str, float], result: StepResult) -> None:
        progress = self.progress
        messages = self.recipe.alerts.check(values, progress.step)
        progress.skipped = progress.skipped + 1 if result.skipped else 0
        for role, rows in result.skipped.items():
            shown = ", ".join(map(str, rows[:8])) + (
                f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            )
            messages.append(
                f"step {progress.step}: {role} not updated, non-finite score, loss or gradient;"
                f" rows {shown}"
            )
        for sink in self.sinks:
            for message in messages:
                sink.alert(progress.step, message)

    def _log(self, step: int, values: Mapping[str, float], samples: list[dict[str, Any]]) -> None:
        for sink in self.sinks:
            sink.log(step, values)
            if samples:
                sink.samples(step, samples)

    # ---------------------------------------------------------------------------------- how it ends

    def _ending(self, values: Mapping[str, float]) -> str:
        """Why the run ends after this step; empty: it goes on. The same on every rank."""
        run, progress = self.recipe.run, self.progress
        if progress.skipped >= run.max_skipped:
            raise UserError(
                f"{progress.skipped} steps in a row had a non-finite score, loss or gradient (step"
                f" {progress.step}; rows in alerts.jsonl)",
                where=(
                    "the last good checkpoint is"
                    f" {checkpoint.latest(self.directory / 'checkpoints') or 'none yet'}"
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
                f"no better held-out figure in {progress.stale} evaluations"
                " (run.stop.score_patience)"
            )
        return "complete" if progress.step >= run.steps else ""

    def _end(self, ending: str) -> None:
        """Links, figures, the Hugging Face folder, the last line. An interrupted run has no
        `final`: it is not at its end."""
        last = self.directory / "checkpoints" / f"step_{self.progress.step}"
        done = not ending.startswith("interrupted")
        if done and self.recipe.run.export_hf:
            self._export()
        if not self.mesh.is_main:
            return
        if done:
            checkpoint.link(self.directory / "final", last)
        for sink in self.sinks:
            sink.close()
        self.sinks.clear()
        if done:
            run_folder.close_run(self.directory, self.recipe)
        advice = "" if done else "; the same command continues"
        print(
            f"{self.recipe.name}: {ending} at step {self.progress.step} of {self.recipe.run.steps};"
            f" {last}{advice}",
            flush=True,
        )

    def _export(self) -> None:
        """RUN/hf: the policy, or the reward model. Collective."""
        # seconds of imports, which a run without an export need not spend
        from gipo_megatron.conversion.convert import export_run

        role, engine = next(iter(self.parts.trained.items()))
        meta = {"step": self.progress.step, **self._about()}
        shown = Display(self.mesh.is_main and "console" in self.recipe.run.loggers)
        export_run(self.directory / "hf", role, engine, self.parts.tokenizer, meta, shown)

    # ---------------------------------------------------------------------------------- checkpoints

    def _save(self, best: bool) -> None:
        with self.timer.phase("save"):
            folder, algorithm = self.directory / "checkpoints", self.parts.algorithm
            state = {
                "progress": self.progress.state_dict(),
                "algorithm": algorithm.state_dict() if isinstance(algorithm, Stateful) else {},
                "alerts": self.recipe.alerts.state_dict(),
            }
            step, keep = self.progress.step, self.recipe.run.keep
            path = checkpoint.save(
                folder,
                step,
                self.parts.trained,
                self.mesh,
                state,
                self._about(),
                self._extra_files,
                keep,
            )
            if best and self.mesh.is_main:
                checkpoint.link(self.directory / "best", path)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says of its origin."""
        recipe, tokenizer = self.recipe, self.parts.tokenizer
        return {
            "tokenizer": tokenizer.fingerprint,
            "chat_template": tokenizer.chat_template,
            "template": recipe.data.template,
            "style": self.parts.train.rows[0].style,
            "recipe": recipe.name,
            "hub": recipe.model.hub,
            "commit": run_folder.commit(),
            "parallel": vars(recipe.parallel),
        }

    def _extra_files(self, folder: Path) -> None:
        """A checkpoint is complete in itself: the tokenizer and the recipe travel with it."""
        self.parts.tokenizer.save(folder / "tokenizer")
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _resume(self, path: Path | None) -> None:
        fingerprint = self.parts.train.fingerprint
        if path is not None:
            self.parts.notes += check_tokenizer(
                path, self.parts.tokenizer, self.recipe.data.template, where="model.tokenizer"
            )
            state = checkpoint.restore(path, self.parts.trained, self.mesh)
            self.progress.load_state_dict(state["progress"])
            if isinstance(self.parts.algorithm, Stateful):
                self.parts.algorithm.load_state_dict(state["algorithm"])
            self.recipe.alerts.load_state_dict(state["alerts"])
            if self.progress.data != fingerprint:
                raise UserError(
                    f"the training data are not those of {path}",
                    where="data",
                    fix=(
                        "resume with the same data, or start a new run.dir with models.<role>.load"
                        " pointing to that checkpoint"
                    ),
                )
        self.progress.data = fingerprint

    def _begin(self, origin: str) -> None:
        """All is built and loaded: from here on the run folder changes. Rank 0 only."""
        recipe, directory, step = self.recipe, self.directory, self.progress.step
        run_folder.open_run(recipe, directory)
        checkpoint.discard_after(directory / "checkpoints", step)
        if step < recipe.run.steps:
            (directory / "final").unlink(missing_ok=True)
        best = directory / "checkpoints" / f"step_{self.progress.best_step}"
        if best.is_dir():
            checkpoint.link(directory / "best", best)
        else:
            (directory / "best").unlink(missing_ok=True)
        self.sinks += make_sinks(
            recipe.run.loggers,
            directory,
            recipe.run.steps,
            name=recipe.name,
            headline=self.parts.algorithm.headline,
            config=run_folder.plain_recipe(recipe),
        )
        for sink in self.sinks:
            sink.resume(step)
        run_folder.announce(
            recipe, self.mesh.world, origin, self.parts.train, self.parts.held_out, self.parts.notes
        )
