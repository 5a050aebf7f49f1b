"""A rank that hangs: the others end, and name it and its last phase; the same command continues."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.faults import runs, systems, world
from tools.faults.systems import LAYOUTS, SYSTEMS, System
from tools.faults.trial import Bench, Trial, expect

STOPPED = "a rank is stopped"
STUCK = "a rank does something that does not end"
SURVIVED = {
    STOPPED: "the others end with exit code 2 and one message with the rank, its process and its"
    " last phase; the same command continues, bit for bit",
    STUCK: "the others end with exit code 2 and one message with each rank's last phase and line;"
    " the same command continues, bit for bit",
}
TIMEOUT = 5.0  # seconds
SECONDS = 90  # for the end of a world whose rank hangs
TRIES = 5  # the run may have ended before
SMALL = ("SFT", "DP 2")
SEVERAL = [name for name, (ranks, _) in LAYOUTS.items() if ranks > 1]


def trials() -> list[Trial]:
    return [*_stops(), *_stuck()]


def _stops() -> Iterator[Trial]:
    for system in SYSTEMS:
        for layout in SEVERAL if len(system.layouts) > 1 else ():
            small = (system.name, layout) == SMALL
            yield Trial(
                STOPPED, f"{system.name}, {layout}", partial(_stopped, system, layout), small
            )
    yield Trial(STOPPED, "all ranks, and continued", _all_stopped)


def _stuck() -> Iterator[Trial]:
    for layout in SEVERAL:
        yield Trial(STUCK, f"SFT, {layout}, rank 1", partial(_endless, layout, 1))
    yield Trial(STUCK, f"SFT, {SEVERAL[0]}, rank 0", partial(_endless, SEVERAL[0], 0))


def _words(bench: Bench, system: System, layout: str) -> list[str]:
    return [*system.command(bench.base, layout), f"parallel.timeout={TIMEOUT:g}"]


def _reference(bench: Bench, system: System, layout: str) -> Path:
    systems.prepare(bench.base)
    folder = bench.base / f"hangs_{system.name}_{layout}".replace(" ", "_")
    if not (folder / runs.ENDED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        system.start(bench.base, folder, layout)
        words = _words(bench, system, layout)
        runs.finished(folder, *words, ranks=LAYOUTS[layout][0])
    return folder


def _place(bench: Bench, system: System, layout: str) -> Path:
    folder = bench.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    system.start(bench.base, folder, layout)
    return folder


def _stopped(system: System, layout: str, bench: Bench) -> None:
    """Stop one of two ranks, as `kill -STOP`, at a random time."""
    reference = _reference(bench, system, layout)
    seconds = json.loads((reference / runs.ENDED).read_text(encoding="utf-8"))
    words, (ranks, _) = _words(bench, system, layout), LAYOUTS[layout]
    rank, share = bench.random.randrange(ranks), bench.random.random()
    for _ in range(TRIES):
        folder = _place(bench, system, layout)
        with world.world(world.GIPO, *words, ranks=ranks, folder=folder) as struck:
            time.sleep(share * seconds)
            struck.signal(signal.SIGSTOP, rank)
            ended = struck.until(lambda: struck.ended(1 - rank), SECONDS)
            struck.kill(rank)
            done = struck.wait()
        if done.codes[1 - rank]:
            break
        share *= 0.7
    when = f"rank {rank} after {share * seconds:.2f} s"
    expect(ended and done.codes[1 - rank] == 2, f"{when}: {done.tail()}")
    message = done.stderr
    named = message.startswith(f"rank {rank} hangs: no sign of life for {TIMEOUT:g} s; last phase:")
    named |= message.startswith(f"rank {rank} has not started: no sign of life for {TIMEOUT:g} s")
    expect(named and len(message.splitlines()) == 3, f"{when}: {done.tail()}")
    _continues(bench, system, layout, reference, when)


def _all_stopped(bench: Bench) -> None:
    """As a suspended container: no rank was silent."""
    system, layout = SYSTEMS[0], SEVERAL[0]
    reference, words = _reference(bench, system, layout), _words(bench, system, layout)
    folder = _place(bench, system, layout)
    with world.world(world.GIPO, *words, ranks=2, folder=folder) as paused:
        expect(paused.until(lambda: runs.logged(folder / systems.RUN, 1)), "no step was made")
        paused.signal(signal.SIGSTOP)
        time.sleep(1.2 * TIMEOUT)
        paused.signal(signal.SIGCONT)
        done = paused.wait()
    expect(done.code == 0 and not done.stderr, done.tail())
    different = system.difference(folder, reference)
    expect(not different, different)


def _endless(layout: str, rank: int, bench: Bench) -> None:
    """Let a rank wait in the second update for what never comes."""
    system, (ranks, _) = SYSTEMS[0], LAYOUTS[layout]
    reference, words = _reference(bench, system, layout), _words(bench, system, layout)
    folder, before = _place(bench, system, layout), partial(_wait_in_step, 2, rank)
    with world.world(world.GIPO, *words, ranks=ranks, folder=folder, before=before) as stuck:
        ended = stuck.until(lambda: stuck.ended(1 - rank), SECONDS)
        stuck.kill(rank)
        done = stuck.wait()
    expect(ended and done.codes[1 - rank] == 2, done.tail())
    phase = f"rank {rank}: update after step 1, in patched (hangs.py:"
    named = f"an exchange between ranks did not end in {1.5 * TIMEOUT:g} s; last phases: "
    expect(named in done.stderr and phase in done.stderr, done.tail())
    expect("Traceback" not in done.stderr, done.tail())
    _continues(bench, system, layout, reference, "stuck")


def _continues(bench: Bench, system: System, layout: str, reference: Path, when: str) -> None:
    folder, words = bench.folder / "work", _words(bench, system, layout)
    again = world.run(world.GIPO, *words, ranks=LAYOUTS[layout][0], folder=folder)
    expect(not again.code and not again.stderr, f"{when}: the second start: {again.tail()}")
    different = system.difference(folder, reference)
    expect(not different, f"{when}: {different}")


def _wait_in_step(step: int, stuck: int, rank: int) -> None:
    """Be without end in the update of `step`, in the process of rank `stuck`."""
    from gipo_megatron.megatron.engine import Engine

    update: Any = Engine.update

    def patched(engine: Engine, *arguments: Any) -> Any:
        while engine.learning_rate.steps == step - 1 and rank == stuck:
            time.sleep(0.1)
        return update(engine, *arguments)

    Engine.update = patched  # type: ignore[method-assign, assignment]
