"""The cells of study S2: trained once, kept as JSON lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.files import append_jsonl, read_jsonl
from tools.studies.bandit import Draws, Runs, World, WorldSpec, train
from tools.studies.networks import imitate, policy_weights
from tools.studies.systems import SYSTEMS

WORLDS = [
    WorldSpec(hacks, offset)
    for hacks, offset in (
        ("none", 0.0), ("easy", 0.0), ("easy", 1.0), ("hard", 0.0),
        ("none", 1.0), ("both", 0.0), ("hard", 1.0), ("both", 1.0),
    )
]  # fmt: skip
# trained last, but in the first two worlds: a run that is stopped early has all claims
CONTROLS = ("gipo_shared", "oracle", "random", "return_variance", "group_dro")
ETAS = [0.05, 0.15, 0.3, 0.45, 0.6]
# PPO with KL is the curve that the others are compared with: it reaches further on both sides, and
# is dense, since straight lines between points of a concave curve lie below it
ETAS_OF = {
    "ppo": [0.0],
    "ppo_kl": sorted([*ETAS, 0.02, 0.1, 0.2, 0.25, 0.35, 0.4, 0.5, 0.75, 1.0]),
}


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


def jobs() -> list[tuple[WorldSpec, str]]:
    """Return (world, system) in the order of training."""
    every = [(spec, name) for spec in WORLDS for name in SYSTEMS]
    return sorted(every, key=lambda job: job[0] not in WORLDS[:2] and 1 + (job[1] in CONTROLS))


def run_all(file: Path, seeds: int, steps: int) -> list[Cell]:
    """Train every cell that the file lacks; return all."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    done = {(c.world, c.system, c.eta) for c in load(file, seeds, steps)}
    for spec, name in jobs():
        etas = [eta for eta in etas_of(name) if (spec.name, name, eta) not in done]
        if etas:
            began = time.perf_counter()
            append_jsonl(file, _train(spec, name, etas, seeds, steps), sync=True)
            print(f"{spec.name}: {name} in {time.perf_counter() - began:.0f} s", flush=True)
    return load(file, seeds, steps)


@lru_cache(maxsize=1)
def _prepared(spec: WorldSpec, seeds: int, steps: int) -> tuple[World, list[Tensor], Draws]:
    """Return the world, the reference's weights, and the draws."""
    world = World.make(spec, range(seeds))
    return world, imitate(policy_weights(range(seeds)), world.reference), Draws(range(seeds), steps)


def _train(
    spec: WorldSpec, name: str, etas: list[float], seeds: int, steps: int
) -> list[dict[str, Any]]:
    """Return one row for each price."""
    world, start, draws = _prepared(spec, seeds, steps)
    trace = train(Runs(SYSTEMS[name], world, start, etas, range(seeds), draws), steps)
    return [
        {
            "world": spec.name,
            "system": name,
            "eta": eta,
            "seeds": list(range(seeds)),
            "steps": steps,
            "trace": {key: _columns(rows, i, seeds) for key, rows in trace.items()},
        }
        for i, eta in enumerate(etas)
    ]


def _columns(rows: list[list[float]], block: int, width: int) -> list[list[float]]:
    return [row[block * width : (block + 1) * width] for row in rows]
