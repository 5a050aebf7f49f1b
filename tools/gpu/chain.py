"""Part `chain`: SFT, reward model, DPO, PPO with KL and GIPO, three steps each, as
`launch/train.py` runs them.

The logged metrics are compared with those of a CPU (golden.json). GIPO also runs with two of its
models offloaded, and once more in two halves with a checkpoint between them: both must log what the
uninterrupted run logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from gipo_megatron.megatron.mesh import Mesh
from tools.gpu.bench import STALE, Bench, Figure, NotRun, below, equal
from tools.gpu.runs import Rows, run

VOLATILE = ("time/", "perf/", "memory/", "rollout/tokens_per_second")  # no two runs share them
# relative, and absolute for what is near 0: float32 sums in another order, over three optimizer
# steps
CLOSE = 1e-3
SMALL = [
    "model.architecture.hidden_size=32",
    "model.architecture.ffn_hidden_size=64",
    "model.architecture.head_dim=8",
    "data.planted.prompts=40",
    "batch.minibatch=8",
    "batch.micro_batch=4",
    "run.eval_prompts=8",
    "run.loggers=[]",
    "run.save_every=0",
    "run.steps=3",
]
PPO = [
    "models.actor.load={sft}",
    "models.reward.load={rm}",
    "batch.prompts=8",
    "batch.responses=2",
    "algorithm.critic_warmup=1",
    "run.eval_every=2",
]
DPO = [
    "with=data/planted",
    "models.actor.load={sft}",
    "models.actor.warmup_steps=1",
    "models.actor.schedule=constant",
]

# run -> its recipe and what differs from SMALL; in this order, since later runs load what earlier
# ones made
RUNS: dict[str, list[str]] = {
    "sft": ["recipe=tiny/sft", "models.actor.warmup_steps=1"],
    "rm": ["recipe=tiny/rm", "models.reward.load={sft}", "models.reward.warmup_steps=1"],
    "dpo": ["recipe=tiny/dpo", *DPO],
    "ppo_kl": ["recipe=tiny/ppo_kl", *PPO],
    "gipo": ["recipe=tiny/gipo", *PPO],
}
ARGUMENTS = {**RUNS, "all": SMALL}
OFFLOAD = ["models.critic.offload=cpu", "models.reference.offload=cpu"]


def chain(bench: Bench) -> Iterator[Figure]:
    golden = bench.golden["chain"]
    if golden["runs"] != ARGUMENTS:
        raise NotRun(STALE)
    folder = bench.scratch / "chain"
    found: dict[str, Rows] = {}
    for name in RUNS:
        found[name] = train(bench.mesh, folder, name)
        yield _compared(
            f"{name}: metrics like a CPU's, worst", found[name], golden["metrics"][name]
        )
    offloaded = train(bench.mesh, folder, "gipo", *OFFLOAD, into="gipo_offload")
    yield _compared("gipo with offload: like without, worst", offloaded, found["gipo"])
    train(bench.mesh, folder, "gipo", "run.steps=2", into="gipo_resumed")
    resumed = train(bench.mesh, folder, "gipo", into="gipo_resumed")
    yield _compared("gipo saved, resumed, continued: like in one go, worst", resumed, found["gipo"])
    yield equal("steps after the resume", [row["step"] for row in resumed][-1], 3)


def words(folder: Path, name: str, *more: str, into: str = "") -> list[str]:
    """The command line of a run."""
    loads = {stage: folder / stage / "final" for stage in ("sft", "rm")}
    return [
        *(word.format(**loads) for word in RUNS[name]),
        *SMALL,
        f"run.dir={folder / (into or name)}",
        *more,
    ]


def train(mesh: Mesh, folder: Path, name: str, *more: str, into: str = "") -> Rows:
    """Run it to its end. Returns metrics.jsonl without what no two runs share."""
    rows = run(mesh, words(folder, name, *more, into=into))
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def _compared(name: str, found: Rows, expected: Rows) -> Figure:
    """The largest |a - b| / max(1, |a|, |b|) over all metrics of all steps, with that metric's
    name; infinite where one is missing."""
    gap, where = worst(found, expected)
    return below(f"{name} ({where})", gap, CLOSE)


def worst(found: Rows, expected: Rows) -> tuple[float, str]:
    if [sorted(row) for row in found] != [sorted(row) for row in expected]:
        return math.inf, "other metrics or steps"
    pairs = [
        (mine, theirs, key) for mine, theirs in zip(found, expected, strict=True) for key in mine
    ]
    return max(
        (apart(mine[key], theirs[key]), f"{key}, step {mine['step']}")
        for mine, theirs, key in pairs
    )


def apart(a: float | None, b: float | None) -> float:
    """None stands for a number that is not defined."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(1.0, abs(a), abs(b))
