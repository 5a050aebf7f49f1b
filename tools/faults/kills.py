"""kill -9 and signals at any moment: the same command continues, to the same bits."""

from __future__ import annotations

import shutil
import signal
import time
from functools import partial
from pathlib import Path

from tools.faults import moments, systems, world
from tools.faults.systems import LAYOUTS, SYSTEMS, System
from tools.faults.trial import Bench, Lost, Trial, expect

KILLS = 20  # of each system, over its layouts
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = (
    "the other ranks end by themselves, without a traceback; the same command continues, and"
    " leaves what a run without the fault does, bit for bit; nothing is half-written"
)
ORDERLY = (
    "exit code 0 after a checkpoint, 130 after Ctrl-C before the first step, or ended by the"
    " signal; no traceback; the same command continues, bit for bit"
)
SURVIVED = {
    **{f"kill -9: {system.name}": SAME for system in SYSTEMS},
    **{f"signals: {system.name}": ORDERLY for system in SYSTEMS},
}
# system, layout, turn
SMALL = {
    ("SFT", "TP 2", 4),
    ("evaluation", "1 process", 2),
    ("to-hf", "1 process", 0),
}
LAST = 10  # writes of a rank: one of them is the third moment of each layout
SCREEN = 12  # lines
LATER = 0.5  # seconds
TRIES = 5  # for a moment by the clock: the run may have ended before


def trials() -> list[Trial]:
    return [trial for system in SYSTEMS for trial in (*_kills(system), *_signals(system))]


def _kills(system: System) -> list[Trial]:
    """Return trials that kill, by turns, before a write and at a time."""
    found = []
    for number in range(KILLS):
        layout = system.layouts[number % len(system.layouts)]
        turn = number // len(system.layouts)
        if turn % 2:
            how, case = partial(_at_a_time, number=signal.SIGKILL), f"{layout}, at a time {turn}"
        else:
            how, case = partial(_before_a_write, turn=turn), f"{layout}, at a write {turn}"
        run = partial(how, system=system, layout=layout)
        small = (system.name, layout, turn) in SMALL
        found.append(Trial(f"kill -9: {system.name}", case, run, small))
    return found


def _signals(system: System) -> list[Trial]:
    return [
        Trial(
            f"signals: {system.name}",
            f"{layout}, {number.name}",
            partial(_at_a_time, system=system, layout=layout, number=number),
            small=number == signal.SIGTERM and (system.name, layout) == ("DPO", "1 process"),
        )
        for layout in system.layouts
        for number in SIGNALS
    ]


def _before_a_write(bench: Bench, system: System, layout: str, turn: int) -> None:
    """Kill one rank before a write of the same or another rank. In turn 2 the second start is
    killed, too; in turn 4 the write is one of the last."""
    reference, random = systems.reference(bench.base, system, layout), bench.random
    ranks = LAYOUTS[layout][0]
    count = moments.writes(reference, ranks)
    of = random.choice([rank for rank in range(ranks) if count[rank]])
    at = random.randint(max(1, count[of] - LAST) if turn == 4 else 1, count[of])
    any_rank = random.randrange(ranks)
    for on in (any_rank, of):  # another rank may have ended already
        words, ranks, folder = _place(bench, system, layout)
        before = partial(moments.begin, folder=folder, at=at, of=of, on=on, number=signal.SIGKILL)
        with world.world(world.GIPO, *words, ranks=ranks, folder=folder, before=before) as struck:
            ended = struck.wait()
        if any(ended.codes):
            break
    when = f"rank {on} before write {at} of rank {of}"
    expect(ended.codes[on] == -signal.SIGKILL, f"{when}: {ended.tail()}")
    if turn == 2 and not (folder / systems.OUT).exists():
        again = random.randint(1, max(1, count[of] // 2))
        strike = partial(
            moments.begin, folder=folder, at=again, of=of, on=of, number=signal.SIGKILL
        )
        second = world.run(world.GIPO, *words, ranks=ranks, folder=folder, before=strike)
        expect("Traceback" not in second.stderr, f"{when}, then {again}: {second.tail()}")
        when = f"{when}, then write {again}"
    _check(bench, system, layout, ended, when, reference, signal.SIGKILL)


def _at_a_time(bench: Bench, system: System, layout: str, number: int) -> None:
    """Signal a rank (kill -9, and every second other signal) or all, some time after one of rank
    0's writes or the start."""
    reference, random = systems.reference(bench.base, system, layout), bench.random
    ranks = LAYOUTS[layout][0]
    one = number == signal.SIGKILL or random.random() < 0.5
    rank = random.randrange(ranks) if one else None
    at, seconds = random.randrange(moments.writes(reference, 1)[0]), random.uniform(0, LATER)
    for _ in range(TRIES):
        words, ranks, folder = _place(bench, system, layout)
        before = partial(moments.begin, folder=folder)
        with world.world(world.GIPO, *words, ranks=ranks, folder=folder, before=before) as struck:
            struck.until(partial(_reached, folder, at))
            time.sleep(seconds)
            early = not struck.ended(rank or 0)
            struck.signal(number, rank)
            ended = struck.wait()
        if early and (number != signal.SIGKILL or -number in ended.codes):
            break
        at, seconds = at // 2, seconds / 2
    else:
        raise Lost(f"the run had always ended before the signal: {ended.tail()}")
    who = "all ranks" if rank is None else f"rank {rank}"
    when = f"{who} {seconds:.2f} s after write {at} of rank 0"
    _check(bench, system, layout, ended, when, reference, number)


def _reached(folder: Path, at: int) -> bool:
    return moments.writes(folder, 1)[0] >= at


def _place(bench: Bench, system: System, layout: str) -> tuple[list[str], int, Path]:
    """Return the command, its number of ranks, and its working folder, made again."""
    folder = bench.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    system.start(bench.base, folder, layout)
    return system.command(bench.base, layout), LAYOUTS[layout][0], folder


def _check(
    bench: Bench,
    system: System,
    layout: str,
    ended: world.Finished,
    when: str,
    reference: Path,
    number: int,
) -> None:
    """Check how a struck run ended, start it again, and compare."""
    # 2: the connection broke off; SIGTERM: as launcher.py ends the ranks that are left
    known = set(ended.codes) <= {0, 2, 130, -number, -signal.SIGTERM}
    screen = "Traceback" not in ended.stderr and ended.stderr.count("\n") <= SCREEN
    expect(known and screen, f"{when}: the end: {ended.tail()}")
    words, ranks = system.command(bench.base, layout), LAYOUTS[layout][0]
    folder = bench.folder / "work"
    if not (folder / systems.OUT).exists():  # a conversion that was complete is refused, rightly
        before = partial(moments.begin, folder=folder)
        again = world.run(world.GIPO, *words, ranks=ranks, folder=folder, before=before)
        well = not again.code and not again.stderr
        expect(well, f"{when}: the second start: {again.tail()}\nthe first: {ended.tail()}")
    different = system.difference(folder, reference)
    expect(not different, f"{when}: {different}; the first start: {ended.tail()}")
