"""The disk fails: it is full, at any write; it takes no large file; it becomes read-only; the
output is a file on it."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tools.faults import hardware, moments, runs, systems, world
from tools.faults.hardware import Disk
from tools.faults.systems import ALONE, LAYOUTS, OUT, RUN, SYSTEMS, System
from tools.faults.trial import Bench, Trial, expect

SCREEN = 25  # lines
SIZES = 6  # a disk is full at about so many sizes in a trial
FILES = (1_000, 10_000, 100_000)  # bytes of the largest file; the message is smaller
SAME = "with more room the same command continues to the same bits"
FULL = f"exit code 2 and one screen with the reason each time, nothing half-written; {SAME}"
READ = "exit code 2 and one screen with the reason; then the same command continues, same bits"
OUTPUT = "exit code 0, or 2 before anything was begun; no traceback; a run that has begun goes on"


def _planted(base: Path) -> list[str]:
    return ["prepare-data", "planted", f"out={OUT}", "data.planted.prompts=20"]


def _prepared(base: Path) -> list[str]:
    rows = f"data.path={base}/prepare-data,_planted_1_process/{OUT}/preference"
    return ["prepare-data", rows, "data.format=preference", f"out={OUT}"]


def _planted_rows(base: Path, folder: Path, layout: str) -> None:
    """Make the files of `_planted`, which are read."""
    systems.reference(base, PLANTED, "1 process")


def _plot(base: Path) -> list[str]:
    return ["plot", str(RUN), "report=report.html"]


def _a_run(base: Path, folder: Path, layout: str) -> None:
    shutil.copytree(base / "sft", folder / RUN, symlinks=True)


def _observed(base: Path) -> list[str]:
    loggers = "run.loggers=[console,tensorboard]"
    return ["train", *runs.sft(RUN, *systems.TINY, loggers)]


def _difference(a: Path, b: Path) -> str:
    one, other = ({**runs.tree(folder)} for folder in (a, b))
    for tree in (one, other):
        tree.pop(runs.ENDED, None)
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    return f"{names[0]} differs" if names else systems.leftovers(a)


OBSERVED = System("SFT with loggers", _observed, systems.training_difference, ALONE)
PLANTED = System("prepare-data, planted", _planted, _difference, ALONE)
MORE = (
    OBSERVED,
    PLANTED,
    System("prepare-data", _prepared, _difference, ALONE, start=_planted_rows),
    System("plot", _plot, _difference, ALONE, start=_a_run),
)
WRITERS = (*SYSTEMS, *MORE)
CONVERSIONS = ("from-hf", "to-hf")  # complete, they are refused a second time
SURVIVED = {
    **{f"full disk: {system.name}": FULL for system in WRITERS},
    "largest file": FULL,
    "read-only folder": READ,
    "becomes read-only": READ,
    "full output": OUTPUT,
}


def trials() -> list[Trial]:
    found = [_limited(system) for system in WRITERS]
    found += [
        Trial("full output", f"{name}, {streams}", partial(_output, words=words, streams=streams))
        for name, words in COMMANDS.items()
        for streams in ((1,), (2,), (1, 2))
    ]
    if not hardware.can_mount():
        return found
    for system in WRITERS:
        for layout in ("1 process", "DP 2"):
            if layout in ALONE or system.name in ("SFT", "evaluation"):
                found += _disks(system, layout)
    found += [Trial("full output", f"in a run, {n}", _output_in_a_run) for n in range(3)]
    return found


def _limited(system: System) -> Trial:
    run = partial(_largest_file, system=system)
    return Trial("largest file", system.name, run, small=system.name == "to-hf")


def _disks(system: System, layout: str) -> list[Trial]:
    full = partial(_full, system=system, layout=layout)
    read_only = partial(_read_only, system=system, layout=layout)
    frozen = partial(_frozen, system=system, layout=layout)
    name = f"{system.name}, {layout}"
    return [
        Trial(f"full disk: {system.name}", f"{layout}, new files", partial(full, what="files")),
        Trial(f"full disk: {system.name}", f"{layout}, pages", partial(full, what="pages")),
        Trial("read-only folder", name, read_only),
        *(Trial("becomes read-only", f"{name}, {n}", frozen) for n in range(2)),
    ]


# ---------------------------------------------------------------------------------------- full disk


def _full(bench: Bench, system: System, layout: str, what: str) -> None:
    """Give the command a little more room each time it ends for want of it."""
    reference = systems.reference(bench.base, system, layout)
    times = 0
    with hardware.disk(bench.base) as disk:
        system.start(bench.base, disk.place, layout)
        for limit in _limits(bench, disk, reference, what, every=system.name in ("SFT", "to-hf")):
            disk.limit(**{what: limit})
            ended = start(bench, system, layout, disk.place)
            if not ended.code:
                break
            refused(ended, "No space left on device")
            left = systems.leftovers(disk.place)
            expect(not left, f"{left} at {what} {limit}: {ended.tail()}")
            times += 1
        expect(times >= 1, "the disk was never full")
        same(system, disk.place, reference)


def _limits(bench: Bench, disk: Disk, reference: Path, what: str, *, every: bool) -> Iterator[int]:
    """Yield rising limits: each number of files, or some sizes, small and large steps."""
    pages, files = disk.used
    limit = pages if what == "pages" else files
    sizes = sum(-(-path.stat().st_size // hardware.PAGE) for path in reference.rglob("*"))
    while True:
        yield limit
        if what == "files":
            limit += 1 if every else bench.random.randint(1, 8)
        else:
            limit += bench.random.choice((1, bench.random.randint(1, 4 * sizes // SIZES)))


def _largest_file(bench: Bench, system: System) -> None:
    reference = systems.reference(bench.base, system, "1 process")
    folder = bench.folder / "work"
    folder.mkdir()
    system.start(bench.base, folder, "1 process")
    times = 0
    for size in FILES:
        before = partial(_begin_limited, folder=folder, size=size)
        words = system.command(bench.base, "1 process")
        ended = world.run(world.GIPO, *words, folder=folder, before=before)
        if not ended.code:
            break
        refused(ended, "File too large")
        left = systems.leftovers(folder)
        expect(not left, f"{left} at {size} bytes: {ended.tail()}")
        times += 1
    expect(times >= 1, "no file was too large")
    if ended.code:
        ended = start(bench, system, "1 process", folder)
        expect(not ended.code, ended.tail())
    same(system, folder, reference)


def _begin_limited(rank: int, folder: Path, size: int) -> None:
    moments.begin(rank, folder)
    hardware.small_files(rank, size)


# ---------------------------------------------------------------------------------------- read-only


def _read_only(bench: Bench, system: System, layout: str) -> None:
    reference = systems.reference(bench.base, system, layout)
    with hardware.disk(bench.base) as disk:
        system.start(bench.base, disk.place, layout)
        before = runs.tree(disk.place)
        disk.read_only(True)
        refused(
            start(bench, system, layout, disk.place), "Read-only file system|no write permission"
        )
        expect(runs.tree(disk.place) == before, "something was written")
        disk.read_only(False)
        ended = start(bench, system, layout, disk.place)
        expect(not ended.code, ended.tail())
        same(system, disk.place, reference)


def _frozen(bench: Bench, system: System, layout: str) -> None:
    """Forbid every change before one of rank 0's writes."""
    reference = systems.reference(bench.base, system, layout)
    at = bench.random.randint(1, moments.writes(reference, 1)[0])
    with hardware.disk(bench.base) as disk:
        system.start(bench.base, disk.place, layout)
        with held_at(bench, system, layout, disk.place, at) as held:
            hardware.freeze(disk.place, True)
            held.signal(signal.SIGCONT, 0)
            ended = held.wait()
        refused(ended, "Operation not permitted")
        hardware.freeze(disk.place, False)
        if not (system.name in CONVERSIONS and (disk.place / OUT).exists()):  # it was done
            ended = start(bench, system, layout, disk.place)
            expect(not ended.code, f"after write {at}: {ended.tail()}")
        same(system, disk.place, reference)


# ------------------------------------------------------------------------------------------- output

COMMANDS = {
    "recipe list": ("recipe", "list"),
    "recipe check": ("recipe", "check", "tiny/sft"),
    "plan": ("plan", "recipe=tiny/sft"),
    "prepare-data": ("prepare-data", "planted"),
    "train": ("train", *runs.sft(RUN, "run.loggers=[console]")),
    "a mistake": ("train", "recipe=tiny/sftt"),
}


def _output(bench: Bench, words: tuple[str, ...], streams: tuple[int, ...]) -> None:
    before = partial(hardware.full_output, streams=streams)
    ended = world.run(world.GIPO, *words, folder=bench.folder, before=before)
    mistake = any(word == "recipe=tiny/sftt" for word in words)
    expected = 2 if mistake or 1 in streams else 0
    expect(ended.code == expected, f"exit code {ended.code}: {ended.tail()}")
    expect("Traceback" not in ended.stderr and "Exception" not in ended.stderr, ended.tail())
    if expected and 2 not in streams and not mistake:
        refused(ended, "No space left on device")


def _output_in_a_run(bench: Bench) -> None:
    """The output is a file on a disk that is full before or after the run has begun."""
    reference = systems.reference(bench.base, OBSERVED, "1 process")
    folder = bench.folder / "work"
    folder.mkdir()
    whole = len(start(bench, OBSERVED, "1 process", folder).stdout.encode())
    shutil.rmtree(folder / RUN)
    with hardware.disk(bench.base) as disk:
        file = disk.place / "output"
        room = bench.random.randrange(whole)
        disk.limit(pages=1)
        before = partial(_begin_with_output, folder=folder, file=file, room=room)
        words = OBSERVED.command(bench.base, "1 process")
        ended = world.run(world.GIPO, *words, folder=folder, before=before)
        expect(file.stat().st_size == hardware.PAGE, "the output was not full")
    expect(ended.code in (0, 2) and "Traceback" not in ended.stderr, ended.tail())
    if ended.code:
        expect(not (folder / RUN / "checkpoints").exists(), f"ended in the run: {ended.tail()}")
        ended = start(bench, OBSERVED, "1 process", folder)
        expect(not ended.code, ended.tail())
    same(OBSERVED, folder, reference)


def _begin_with_output(rank: int, folder: Path, file: Path, room: int) -> None:
    moments.begin(rank, folder)
    hardware.output(rank, file, room)


# ------------------------------------------------------------------------------------------- checks


@contextmanager
def held_at(
    bench: Bench, system: System, layout: str, folder: Path, at: int
) -> Iterator[world.World]:
    """Start the command, and stop rank 0 before its write `at`."""
    before = partial(moments.begin, folder=folder, at=at, number=signal.SIGSTOP)
    words, ranks = system.command(bench.base, layout), LAYOUTS[layout][0]
    with world.world(world.GIPO, *words, ranks=ranks, folder=folder, before=before) as held:
        expect(held.until(lambda: hardware.stopped(held.pid(0))), f"no write {at}")
        yield held


def start(bench: Bench, system: System, layout: str, folder: Path) -> world.Finished:
    """Run the command to its end."""
    before = partial(moments.begin, folder=folder)
    words, ranks = system.command(bench.base, layout), LAYOUTS[layout][0]
    return world.run(world.GIPO, *words, ranks=ranks, folder=folder, before=before)


def refused(ended: world.Finished, reason: str) -> None:
    """Check exit code 2 and one screen with the reason, a pattern, without a traceback."""
    good = 2 in ended.codes and re.search(reason, ended.stderr) is not None
    expect(good, f"not refused: {ended.tail()}")
    good = "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= SCREEN
    expect(good, f"more than a screen: {ended.tail()}")


def same(system: System, folder: Path, reference: Path) -> None:
    different = system.difference(folder, reference)
    expect(not different, different)
