"""The commands that the campaign breaks off, at tiny size, and what each leaves when it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.faults import moments, runs

# name -> ranks, words
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "TP 2": (2, ("parallel.tensor=2",)),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "DP 2": (2, ()),
}
ALONE = ("1 process",)
RUN = Path("run")  # in the working folder: two runs then have the same recipe.yaml
OUT = Path("out")
LEFTOVERS = ("*.tmp", "*.partial", "*.old")
TINY = (
    "run.eval_prompts=4",
    "run.eval_every=2",
    "run.save_every=1",
    "run.keep=2",
)
EVALUATION = """\
defaults: [base/evaluate, hardware/cpu]
model: {{tokenizer: bytes}}
policies: {{sft: {{load: {base}/sft/final}}, other: {{load: {base}/other/final}}}}
models: {{reward: {{load: {base}/rm/final}}}}
tasks:
  - {{name: short, kind: helpful, data: prompts.jsonl, template: hh, prompts: 9, max_length: 48}}
data_root: {base}
generation: {{max_response: 6, batch: 2}}
judge: reward_model
report: {{bootstrap: 50}}
run: {{dir: run}}
"""


def _nothing(base: Path, folder: Path, layout: str) -> None:
    """Start in an empty folder."""


@dataclass(frozen=True)
class System:
    """A command in a working folder of its own."""

    name: str
    words: Callable[[Path], list[str]]  # of the folder with the campaign's weights
    difference: Callable[[Path, Path], str]  # between two working folders; "": none
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    start: Callable[[Path, Path, str], None] = _nothing  # fills the working folder before

    def command(self, base: Path, layout: str) -> list[str]:
        return [*self.words(base), *LAYOUTS[layout][1]]


def prepare(base: Path) -> None:
    """Make the weights and prompts of all systems, where they are not there."""
    runs.trained(base)
    other = runs.sft(base / "other", "run.seed=2", "models.actor.lr=1e-2")
    runs.finished(base / ".other", "train", *other)
    (base / "evaluation.yaml").write_text(EVALUATION.format(base=base), encoding="utf-8")
    (base / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Write {"very " * (i % 4)}number {i}."}}\n' for i in range(9)),
        encoding="utf-8",
    )


# ----------------------------------------------------------------------------------------- training


def _sft(base: Path) -> list[str]:
    return ["train", *runs.sft(RUN, *TINY)]


def _gipo(base: Path) -> list[str]:
    small = "batch.prompts=4", "batch.minibatch=4", "batch.micro_batch=2"
    return ["train", *runs.ppo("gipo", RUN, base, *TINY, *small)]


def _dpo(base: Path) -> list[str]:
    return ["train", *runs.dpo(RUN, base, *TINY, "run.steps=3")]


def _export(base: Path) -> list[str]:
    return [*_sft(base), "run.export_hf=true"]


def _trained_but_not_exported(base: Path, folder: Path, layout: str) -> None:
    """Put a run there that was killed after its last checkpoint."""
    made = base / f"exported_{layout.replace(' ', '_')}"
    ranks, more = LAYOUTS[layout]
    runs.finished(made, *_sft(base), *more, ranks=ranks)
    shutil.copytree(made / RUN, folder / RUN, symlinks=True)
    (folder / RUN / "final").unlink()


def training_difference(a: Path, b: Path) -> str:
    """Return the first difference of two runs: their story, checkpoints, links and model folder."""
    one, other = a / RUN, b / RUN
    if different := runs.difference(one, other):
        return different
    if not (one / "report.html").is_file():  # it has times
        return "report.html is missing"
    parts = ("checkpoints", "hf", "final", "best", "recipe.yaml", "figures")
    return _first(_trees(one, other, parts)) or leftovers(one)


# ------------------------------------------------------------------------- evaluation, conversion


def _evaluation(base: Path) -> list[str]:
    return ["evaluate", f"recipe={base}/evaluation.yaml"]


def _evaluation_difference(a: Path, b: Path) -> str:
    """Return the first difference of two evaluations, in any file but environment.json."""
    one, other = runs.tree(a / RUN), runs.tree(b / RUN)
    one.pop("environment.json"), other.pop("environment.json")
    return _first(_unequal(one, other)) or leftovers(a / RUN)


def _from_hf(base: Path) -> list[str]:
    return ["convert", "from-hf", f"hf={base}/sft/hf", f"out={OUT}"]


def _to_hf(base: Path) -> list[str]:
    return ["convert", "to-hf", f"checkpoint={base}/sft/final", f"out={OUT}"]


def _conversion_difference(a: Path, b: Path) -> str:
    return _first(_trees(a, b, (str(OUT),))) or leftovers(a)


# -------------------------------------------------------------------------------------------- files


def leftovers(folder: Path) -> str:
    """Return the name of an unfinished file in `folder`; "" for none."""
    found = (path for pattern in LEFTOVERS for path in folder.rglob(pattern))
    return next((f"{path.relative_to(folder)} is left" for path in found), "")


def _trees(a: Path, b: Path, parts: tuple[str, ...]) -> Iterator[str]:
    one, other = runs.tree(a), runs.tree(b)
    kept = [
        {name: value for name, value in tree.items() if name.split("/")[0] in parts}
        for tree in (one, other)
    ]
    return _unequal(*kept)


def _unequal(one: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for each file that differs."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) == other.get(name):
            continue
        if name in one and name in other:
            yield f"{name} differs"
        else:
            yield f"{name} {'is new' if name in one else 'is missing'}"


def _first(found: Iterator[str]) -> str:
    return next(found, "")


SYSTEMS = (
    System("SFT", _sft, training_difference),
    System("GIPO", _gipo, training_difference),
    System("DPO", _dpo, training_difference),
    System("evaluation", _evaluation, _evaluation_difference),
    System("from-hf", _from_hf, _conversion_difference, ALONE),
    System("to-hf", _to_hf, _conversion_difference, ALONE),
    System("export", _export, training_difference, start=_trained_but_not_exported),
)


def reference(base: Path, system: System, layout: str) -> Path:
    """Return the working folder of a run without a fault, made at the first call."""
    prepare(base)
    folder = base / f"{system.name}_{layout}".replace(" ", "_")
    if not (folder / runs.ENDED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        system.start(base, folder, layout)
        before = partial(moments.begin, folder=folder)
        words = system.command(base, layout)
        runs.finished(folder, *words, ranks=LAYOUTS[layout][0], before=before)
    return folder
