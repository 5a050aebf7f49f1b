"""The machine around a run: a clock that jumps, a second run in its folder, a port that is taken,
data that change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gipo_megatron.launcher import world_variables
from tools.faults import hardware, moments, runs, systems, world
from tools.faults.storage import WRITERS, held_at, refused, same, start
from tools.faults.systems import LAYOUTS, RUN, SYSTEMS, System
from tools.faults.trial import Bench, Trial, expect

CLOCK = "every reading of the time of day jumps by up to a year: the same bits, and no wait"
SECOND = "exit code 2, and the first one's process is named; the first one ends as if alone"
PORT = "exit code 2, and the address is named; a launcher of several processes finds another port"
DATA = (
    "between two starts: exit code 2, `data` is named, and with the old rows the run continues to"
    " the same bits; held-out rows: a warning names them; during a run: nothing changes"
)
SURVIVED = {
    "clock jumps": CLOCK,
    "two at once": SECOND,
    "port taken": PORT,
    "data change": DATA,
}
ONE = "1 process"


def trials() -> list[Trial]:
    found = [
        Trial("clock jumps", f"{system.name}, {layout}", partial(_clock, system, layout))
        for system in WRITERS
        for layout in (ONE, "DP 2")
        if layout in system.layouts
    ]
    found += [
        Trial("two at once", f"{first} and {second}, {layout}", _pair(first, second, layout))
        for first, second, layout in PAIRS
    ]
    found += [
        Trial("port taken", "MASTER_PORT", _master_port),
        Trial("port taken", "serve.port", _serve_port),
        Trial("port taken", "--nproc 2", _launcher),
    ]
    for name, change in CHANGES.items():
        found += [
            Trial("data change", f"{name}, between two starts", partial(_between, change)),
            Trial("data change", f"{name}, during a run", partial(_during, change)),
        ]
    found.append(Trial("data change", "held-out rows", _held_out))
    return found


# -------------------------------------------------------------------------------------------- clock


def _clock(system: System, layout: str, bench: Bench) -> None:
    reference = systems.reference(bench.base, system, layout)
    folder = _folder(bench, system, layout)
    before = partial(_begin_without_clock, folder=folder, seed=bench.random.randrange(2**32))
    words, ranks = system.command(bench.base, layout), LAYOUTS[layout][0]
    ended = world.run(world.GIPO, *words, ranks=ranks, folder=folder, before=before)
    expect(not ended.code and not ended.stderr, ended.tail())
    same(system, folder, reference)


def _begin_without_clock(rank: int, folder: Path, seed: int) -> None:
    moments.begin(rank, folder)
    hardware.moving_clock(rank, seed + rank)


# -------------------------------------------------------------------------------------- two at once

PAIRS = (
    ("SFT", "SFT", ONE),
    ("SFT", "SFT", "DP 2"),
    ("GIPO", "SFT", ONE),
    ("SFT", "evaluation", ONE),
    ("evaluation", "evaluation", ONE),
    ("evaluation", "SFT", "DP 2"),
    ("to-hf", "to-hf", ONE),
    ("from-hf", "from-hf", ONE),
    ("from-hf", "to-hf", ONE),
)


def _pair(first: str, second: str, layout: str) -> Callable[[Bench], None]:
    named = {system.name: system for system in SYSTEMS}
    return partial(_two, named[first], named[second], layout)


def _two(first: System, second: System, layout: str, bench: Bench) -> None:
    """Start the second while the first is stopped before one of its writes, but the first two:
    a folder, and the lock in it."""
    reference = systems.reference(bench.base, first, layout)
    systems.reference(bench.base, second, layout)
    folder = _folder(bench, first, layout)
    at = bench.random.randint(3, moments.writes(reference, 1)[0])
    with held_at(bench, first, layout, folder, at) as held:
        other = _another(bench, second, layout, folder)
        refused(other, f"process {held.pid(0)} on ")
        held.signal(signal.SIGCONT, 0)
        ended = held.wait()
    expect(not ended.code and not ended.stderr, f"before write {at}: {ended.tail()}")
    same(first, folder, reference)


def _another(bench: Bench, system: System, layout: str, folder: Path) -> world.Finished:
    """Run a command in `folder`; its writes are not counted."""
    words, ranks = system.command(bench.base, layout), LAYOUTS[layout][0]
    return world.run(world.GIPO, *words, ranks=ranks, folder=folder)


# --------------------------------------------------------------------------------------------- port


def _master_port(bench: Bench) -> None:
    """Two ranks without a launcher, which meet at a port that another program has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = world_variables(0, 2, port) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
        words = ("train", *runs.sft(RUN))
        ended = world.run(world.GIPO, *words, folder=bench.folder, env=variables)
    refused(ended, f"127.0.0.1:{port}")
    expect(not (bench.folder / RUN).exists(), "a run folder was made")


def _serve_port(bench: Bench) -> None:
    runs.trained(bench.base)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = f"[{sys.executable}, -c, 'raise SystemExit(3)', '{{port}}']"
        rollout = f"algorithm.rollout={{name: vllm, serve: {{command: {command}, port: {port}}}}}"
        words = ("train", *runs.ppo("gipo", RUN, bench.base, rollout))
        ended = world.run(world.GIPO, *words, folder=bench.folder)
    refused(ended, f"port {port} is taken")
    expect(not (bench.folder / RUN / "checkpoints").exists(), "the run had begun")


def _launcher(bench: Bench) -> None:
    """`--nproc` takes a free port, also where MASTER_PORT is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {**os.environ, "MASTER_PORT": port, "PYTHONPATH": str(world.ROOT)}
        command = [sys.executable, str(world.ROOT / "launch" / "train.py"), "--nproc", "2"]
        done = subprocess.run(
            [*command, *runs.sft(RUN)],
            cwd=bench.folder,
            env=variables,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
    expect(not done.returncode and not done.stderr, f"{done.returncode}: {done.stderr}")
    expect((bench.folder / RUN / "final").exists(), "the run is not complete")


# --------------------------------------------------------------------------------------------- data


def _rows(base: Path, folder: Path, layout: str) -> None:
    """Write rows that an SFT run reads."""
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _changed(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace("It is 3.", "No."), encoding="utf-8")


def _truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _reordered(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(reversed(lines)), encoding="utf-8")


def _longer(file: Path) -> None:
    with file.open("a", encoding="utf-8") as rows:
        rows.write('{"prompt": "Say more.", "response": "More."}\n')


def _removed(file: Path) -> None:
    file.unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    "another response": _changed,
    "truncated": _truncated,
    "another order": _reordered,
    "more rows": _longer,
    "removed": _removed,
}
# several epochs: the rows are dealt again during the run
DATA_WORDS = ("data.format=sft", "data.path=rows.jsonl", "data.held_out=0.2", "data.max_length=64")
ON_ROWS = System(
    "SFT on rows",
    lambda base: ["train", *runs.sft(RUN, *systems.TINY, *DATA_WORDS, "run.steps=6")],
    systems.training_difference,
    start=_rows,
)


def _between(change: Callable[[Path], None], bench: Bench) -> None:
    reference = systems.reference(bench.base, ON_ROWS, ONE)
    folder = _folder(bench, ON_ROWS, ONE)
    with held_at(bench, ON_ROWS, ONE, folder, moments.writes(reference, 1)[0] // 2) as held:
        held.kill()
        held.wait()
    expect(any((folder / RUN / "checkpoints").glob("step_*")), "no checkpoint before the change")
    kept = shutil.copy(folder / "rows.jsonl", bench.folder)
    change(folder / "rows.jsonl")
    refused(start(bench, ON_ROWS, ONE, folder), r"data differ|rows\.jsonl")
    shutil.copy(kept, folder)
    ended = start(bench, ON_ROWS, ONE, folder)
    expect(not ended.code, ended.tail())
    same(ON_ROWS, folder, reference)


def _held_out(bench: Bench) -> None:
    """Held-out rows in a file of their own: the run goes on, and a warning names them."""
    folder = _folder(bench, ON_ROWS, ONE)
    rows = folder / "rows"
    rows.mkdir()
    (folder / "rows.jsonl").rename(rows / "train.jsonl")
    shutil.copy(rows / "train.jsonl", rows / "test.jsonl")
    words = [*ON_ROWS.command(bench.base, ONE), "data.path=rows"]
    first = world.run(world.GIPO, *words, folder=folder)
    expect(not first.code and "held-out rows" not in first.stdout, first.tail())
    _changed(rows / "test.jsonl")
    again = world.run(world.GIPO, *words, "run.steps=8", folder=folder)
    warned = "warning: other held-out rows than at " in again.stdout
    expect(not again.code and warned, again.tail())


def _during(change: Callable[[Path], None], bench: Bench) -> None:
    reference = systems.reference(bench.base, ON_ROWS, ONE)
    folder = _folder(bench, ON_ROWS, ONE)
    with held_at(bench, ON_ROWS, ONE, folder, moments.writes(reference, 1)[0] // 3) as held:
        change(folder / "rows.jsonl")
        held.signal(signal.SIGCONT, 0)
        ended = held.wait()
    expect(not ended.code and not ended.stderr, ended.tail())
    same(ON_ROWS, folder, reference)


# ------------------------------------------------------------------------------------------- common


def _folder(bench: Bench, system: System, layout: str) -> Path:
    folder = bench.folder / "work"
    folder.mkdir()
    system.start(bench.base, folder, layout)
    return folder
