"""A run's folder besides its numbers: recipe.yaml, environment.json, figures, report.html; and the
lines printed before the first step."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gipo_megatron import registry
from gipo_megatron.data.batching import Dataset
from gipo_megatron.environment import commit, emit, variables
from gipo_megatron.environment import line as environment_line
from gipo_megatron.errors import UserError
from gipo_megatron.files import write_json, write_text
from gipo_megatron.recipe.length import describe_length
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import plain
from gipo_megatron.screen import shown
from gipo_megatron.statistics import wilson_interval

# the held-out metric that chooses the best checkpoint: the first that a run has, and its sign
JUDGED_BY = (("eval/gold", 1), ("eval/score", 1), ("eval/accuracy", 1), ("eval/loss", -1))
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "omegaconf",
    "datasets",
    "numpy",
)


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    tree = plain(recipe.tree)
    assert isinstance(tree, dict)
    return tree


def check_writable(directory: Path, key: str) -> None:
    """Raise UserError, which names `key`, where a run could not write, before anything is built.
    Writes nothing."""
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "no write permission" if place.is_dir() else "not a folder"
        raise UserError(
            f"cannot write to {directory}: {place}: {why}",
            where=key,
            fix="choose a folder you may write to",
        )


def open_run(recipe: Recipe, directory: Path) -> None:
    """Write the expanded recipe with its origins, and the environment with what a report shows
    first. Rank 0 only."""
    page: Any = registry.lookup("algorithm", recipe.algorithm["name"])
    shown = {"stage": page.stage, "headline": page.headline}
    write_text(directory / "recipe.yaml", recipe.to_yaml())
    write_json(directory / "environment.json", environment() | shown)


def environment() -> dict[str, Any]:
    """Return versions, the commit, the command line, the size of the world, and the variables that
    CUDA and its libraries read."""
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": variables(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def with_interval(values: Mapping[str, float]) -> dict[str, float]:
    """Add the 95 % interval of an accuracy: eval/accuracy_low, eval/accuracy_high."""
    result = dict(values)
    if values.get("eval/pairs", 0) > 0:
        low, high = wilson_interval(values["eval/accuracy"], round(values["eval/pairs"]))
        result |= {"eval/accuracy_low": low, "eval/accuracy_high": high}
    return result


def announce(
    recipe: Recipe, world: int, origin: str, train: Dataset, held_out: Dataset, notes: Sequence[str]
) -> None:
    """Print the run that is about to start; `notes` are warnings that only its weights could
    give."""
    p = recipe.parallel
    data = world // p.model
    processes = f"{world} process{'es' if world > 1 else ''}"
    print(
        f"{recipe.name}: {origin}; {processes} = tensor {p.tensor} × pipeline {p.pipeline} ×"
        f" data {data}; writes to {recipe.run.dir}"
    )
    print(f"  {environment_line()}")
    print(f"  {describe_length(recipe, len(train))}")
    for split, rows in (("train", train), ("held out", held_out)):
        for line in rows.report:
            print(shown(f"  {split}: {line}"))
    for warning in dict.fromkeys((*recipe.warnings, *notes)):
        print(shown(f"  warning: {warning}"))
    sys.stdout.flush()


def announce_complete(recipe: Recipe, checkpoint: Path) -> None:
    """Print that nothing is left to do, and how to get the Hugging Face folder where it lacks."""
    folder = recipe.run.dir
    longer = "run.steps" if recipe.run.steps is not None else "run.epochs"
    print(f"{recipe.name}: complete already, {checkpoint}; a larger {longer} continues it")
    if recipe.run.export_hf and not Path(folder, "hf").exists():
        print(
            "  its Hugging Face folder: gipo convert to-hf"
            f" checkpoint={folder}/final out={folder}/hf"
        )
    sys.stdout.flush()


def close_run(directory: Path, recipe: Recipe) -> None:
    """Write figures/ and report.html, and print the course of the gold reward, if there is one."""
    # matplotlib: a second at start-up
    from gipo_megatron.reports.gold import gold_course
    from gipo_megatron.reports.run_report import write_report
    from gipo_megatron.reports.runs import load_run

    write_report(
        [directory], directory / "report.html", title=recipe.name, figures_to=directory / "figures"
    )
    if course := gold_course(load_run(directory)):
        emit(f"{recipe.name}: held-out gold: {course}", error=False)
