"""The cells of study S4: one trained policy each, with its scores on every test prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gipo_megatron.errors import UserError
from gipo_megatron.files import read_jsonl

LOW, MIDDLE, HIGH = 0.02, 0.05, 0.15  # KL coefficients
BASELINE = "ppo_kl"
# In the order of training: a run that is cut after any cell compares what it has. The lowest η has
# the highest KL, so from the second cell on the others lie on the curve from the start to it.
CELLS = (
    (BASELINE, LOW),
    ("gipo_head", MIDDLE),
    (BASELINE, MIDDLE),
    ("gipo_value", MIDDLE),
    ("adaptive", MIDDLE),
    (BASELINE, HIGH),
)
# after the cells of all seeds
CONTROLS = tuple((name, MIDDLE) for name in ("oracle", "random", "return_variance", "group_dro"))
REGISTERED = ("gipo_head", "gipo_value", "adaptive")
START, AGAIN = "start", "start_again"  # the model before PPO, and other responses of it


@dataclass(frozen=True)
class Cell:
    """One policy of one seed. The lists have one item per test prompt, in the order of `prompts`.

    gold: anchored score of the gold ensemble; proxy: that of the model trained against; kl: nats of
    the response; start and start_again have η and iterations 0.
    """

    seed: int
    system: str
    eta: float
    iterations: int
    price: float  # mean KL coefficient of training
    prompts: list[str]
    source: list[str]
    gold: list[float]
    proxy: list[float]
    kl: list[float]
    tokens: list[int]
    finished: list[bool]
    refuses: list[bool]

    @property
    def key(self) -> tuple[int, str, float]:
        return self.seed, self.system, self.eta


@dataclass(frozen=True)
class Accuracy:
    """Share of the test pairs whose chosen response has the higher score, with its 95 % interval
    (Wilson 1927)."""

    share: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Models:
    """The reward models of one seed, measured on the test pairs."""

    seed: int
    proxy: Accuracy
    gold: Accuracy
    members: list[float]  # accuracies of the gold ensemble's members
    seconds: float  # of training and measuring
    device: str

    @staticmethod
    def of(row: dict[str, Any]) -> Models:
        accuracies = {name: Accuracy(**row[name]) for name in ("proxy", "gold")}
        return Models(**{**row, **accuracies})


def load_cells(file: Path) -> list[Cell]:
    """Return the finished cells.

    Raises UserError where two have other test prompts or another number of iterations: they cannot
    be compared.
    """
    cells = [Cell(**row) for _, row in read_jsonl(file)]
    trained = {cell.iterations for cell in cells if cell.iterations}
    if any(cell.prompts != cells[0].prompts for cell in cells) or len(trained) > 1:
        raise UserError(
            f"cells with different test prompts or iterations {sorted(trained)}",
            where=str(file),
            fix="use one out=FOLDER for each data set and number of iterations",
        )
    return cells


def load_models(file: Path) -> dict[int, Models]:
    """Return {seed: its reward models}."""
    return {models.seed: models for models in (Models.of(row) for _, row in read_jsonl(file))}


def array(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)
