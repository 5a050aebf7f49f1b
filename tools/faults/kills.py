"""kill -9 of a rank at any moment: the same command continues, to the same bits."""

from __future__ import annotations

from pathlib import Path

from tools.faults import runs, world
from tools.faults.trial import Bench, Trial, expect

SURVIVED = {
    "kill -9: SFT": "the same command continues; metrics, samples and checkpoints as never killed",
}
SFT = ("run.steps=4", "run.save_every=1", "run.keep=2", "run.eval_every=2")


def trials() -> list[Trial]:
    return [Trial("kill -9: SFT", "after step 2", _after_step_2, small=True)]


def _after_step_2(bench: Bench) -> None:
    words = ("train", *runs.sft(Path("run"), *SFT))
    reference = runs.finished(bench.base / "sft_killed", *words)
    directory = bench.folder / "run"
    with world.world(world.GIPO, *words, folder=bench.folder) as killed:
        expect(killed.until(lambda: runs.logged(directory, 2)), "step 2 never came")
        killed.kill()
        expect(killed.wait().code == -9, "it had ended before")
    done = world.run(world.GIPO, *words, folder=bench.folder)
    expect(done.codes == (0,) and not done.stderr, done.tail())
    different = runs.difference(directory, reference / "run")
    expect(not different, different)
