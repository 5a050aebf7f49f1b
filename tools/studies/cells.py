"""The cells of study S2: trained once, kept as JSON lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gipo_megatron.files import append_jsonl, read_jsonl
from tools.studies.bandit import Draws, Runs, World, WorldSpec, imitate, policy_weights, train
from tools.studies.systems import SYSTEMS

WORLDS = [
    WorldSpec(hacks, offset) for offset in (0.0, 1.0) for hacks in ("none", "easy", "hard", "both")
]
ETAS = [0.05, 0.15, 0.3, 0.45, 0.6]
# PPO with KL is the curve that the others are compared with: it reaches further on both sides
ETAS_OF = {"ppo": [0.0], "ppo_kl": [0.02, *ETAS, 1.0]}


@dataclass(frozen=True)
class Cell:
    """One system at one price in one world; each list of the trace has a row per measured iteration
    and a column per seed."""

    world: str
    system: str
    eta: float
    seeds: list[int]
    steps: int
    trace: dict[str, list[list[float]]]


def etas_of(system: str) -> list[float]:
    return ETAS_OF.get(system, ETAS)


def load(file: Path, seeds: int, steps: int) -> list[Cell]:
    """Return the finished cells with these settings."""
    cells = [Cell(**row) for _, row in read_jsonl(file)]
    return [c for c in cells if c.seeds == list(range(seeds)) and c.steps == steps]


def run_all(file: Path, seeds: int, steps: int) -> list[Cell]:
    """Train every cell that the file lacks; return all."""
    torch.set_num_threads(1)
    done = {(c.world, c.system, c.eta) for c in load(file, seeds, steps)}
    for spec in WORLDS:
        missing = {
            name: [eta for eta in etas_of(name) if (spec.name, name, eta) not in done]
            for name in SYSTEMS
        }
        if any(missing.values()):
            for rows in _train(spec, missing, list(range(seeds)), steps):
                append_jsonl(file, rows, sync=True)
    return load(file, seeds, steps)


def _train(
    spec: WorldSpec, missing: dict[str, list[float]], seeds: list[int], steps: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield, for each system, the rows of the prices that are missing."""
    world = World.make(spec, seeds)
    start = imitate(policy_weights(seeds), world.reference)
    draws = Draws(seeds, steps)
    for name, etas in missing.items():
        if not etas:
            continue
        began = time.perf_counter()
        trace = train(Runs(SYSTEMS[name], world, start, etas, seeds, draws), steps)
        print(f"{spec.name}: {name} in {time.perf_counter() - began:.0f} s", flush=True)
        yield [
            {
                "world": spec.name,
                "system": name,
                "eta": eta,
                "seeds": seeds,
                "steps": steps,
                "trace": {key: _columns(rows, i, len(seeds)) for key, rows in trace.items()},
            }
            for i, eta in enumerate(etas)
        ]


def _columns(rows: list[list[float]], block: int, width: int) -> list[list[float]]:
    return [row[block * width : (block + 1) * width] for row in rows]
