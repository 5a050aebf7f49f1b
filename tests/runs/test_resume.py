"""A run that was killed, or is started again, tells the same story as one that was left alone."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.runs import chain
from tools.faults.runs import tree


def kill_after_step_2(directory: Path, base: Path) -> None:
    with chain.running(chain.long_gipo(directory, base)) as run:
        chain.wait_for(lambda: chain.logged(directory, 2), run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(30)
    assert not (directory / "final").exists()


def kill_while_writing(directory: Path, base: Path) -> None:
    """Stopped, looked at, and killed: what is left is a half-written checkpoint."""
    with chain.running(chain.long_gipo(directory, base)) as run:

        def writing() -> bool:
            return any((directory / "checkpoints").glob("step_*.tmp"))

        chain.wait_for(lambda: chain.logged(directory, 2), run)
        while True:
            chain.wait_for(writing, run)
            os.kill(run.pid, signal.SIGSTOP)
            if writing():
                break
            os.kill(run.pid, signal.SIGCONT)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(30)
    assert writing() and not (directory / "final").exists()


def killed_at_the_end(directory: Path, base: Path) -> None:
    """What a kill leaves after the last checkpoint, before an older one goes and `final` comes."""
    shutil.copytree(base / "gipo_long", directory, symlinks=True)
    (directory / "final").unlink()
    shutil.copytree(directory / "checkpoints" / "step_4", directory / "checkpoints" / "step_3")


@pytest.fixture(scope="module")
def resumed(base: Path) -> tuple[Path, list[chain.Outcome]]:
    """Two killed runs, then in one start: both again, and what else a second start may meet."""
    kill_after_step_2(base / "killed", base)
    kill_while_writing(base / "killed_writing", base)
    shutil.copytree(base / "killed", base / "other_data", symlinks=True)
    shutil.copytree(base / "killed", base / "never", symlinks=True)
    shutil.copytree(base / "killed", base / "branch", symlinks=True)
    shutil.copytree(base / "gipo", base / "longer", symlinks=True)
    killed_at_the_end(base / "unfinished", base)
    step_1 = base / "killed" / "checkpoints" / "step_1"
    before = {name: tree(base / name) for name in ("gipo_long", "other_data", "never")}
    shutil.copytree(step_1, base / "kept_step_1")
    cases = [
        chain.long_gipo(base / "killed", base),
        chain.long_gipo(base / "killed_writing", base),
        chain.long_gipo(base / "gipo_long", base),
        chain.long_gipo(base / "other_data", base, "data.planted.seed=1"),
        chain.long_gipo(base / "never", base, "run.resume=never"),
        chain.long_gipo(base / "branch", base, f"run.resume={base}/kept_step_1"),
        chain.ppo("gipo", base / "longer", base, "run.steps=5"),
        chain.long_gipo(base / "unfinished", base),
    ]
    done = chain.outcomes(cases, base)
    # the complete run and the refused ones: nothing changed
    assert before == {name: tree(base / name) for name in before}
    return base, done


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "case"), [("killed", 0), ("killed_writing", 1)])
def test_killed_at_any_moment(
    resumed: tuple[Path, list[chain.Outcome]], name: str, case: int
) -> None:
    base, done = resumed
    assert done[case].error == "" and "resumed from" in done[case].printed
    chain.same_story(base / name, base / "gipo_long")
    assert os.readlink(base / name / "final") == os.readlink(base / "gipo_long" / "final")
    assert os.readlink(base / name / "best") == os.readlink(base / "gipo_long" / "best")
    names = [p.name for p in (base / name / "checkpoints").iterdir()]
    assert sorted(names) == sorted(p.name for p in (base / "gipo_long" / "checkpoints").iterdir())


@pytest.mark.multiprocess
def test_killed_after_the_last_checkpoint(resumed: tuple[Path, list[chain.Outcome]]) -> None:
    base, done = resumed
    assert done[7].error == "" and "complete at step 5 of 5" in done[7].printed
    one, other = (base / name / "checkpoints" for name in ("unfinished", "gipo_long"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert os.readlink(base / "unfinished" / "final") == "checkpoints/step_5"


@pytest.mark.multiprocess
def test_a_complete_run_says_so(resumed: tuple[Path, list[chain.Outcome]]) -> None:
    base, done = resumed
    assert done[2].error == ""
    assert (
        done[2].printed
        == f"tiny/gipo: complete already, {base}/gipo_long/checkpoints/step_5; a larger run.steps"
        " continues it\n"
    )


@pytest.mark.multiprocess
def test_other_data_and_used_folders_are_refused(resumed: tuple[Path, list[chain.Outcome]]) -> None:
    _, done = resumed
    assert (
        done[3].error.startswith("the training data differ from those of ")
        and "  where: data\n" in done[3].error
    )
    assert "holds a run already" in done[4].error and "run.resume=auto" in done[4].error


@pytest.mark.multiprocess
def test_from_an_earlier_checkpoint(resumed: tuple[Path, list[chain.Outcome]]) -> None:
    """Rows and checkpoints after it belong to another history: they go, and `keep` counts the new
    ones only."""
    base, done = resumed
    assert done[5].error == ""
    chain.same_story(base / "branch", base / "gipo_long")
    assert os.readlink(base / "branch" / "final") == "checkpoints/step_5"


@pytest.mark.multiprocess
def test_a_longer_run_continues(resumed: tuple[Path, list[chain.Outcome]]) -> None:
    """Three steps, then five, is five steps, but for the held-out evaluation at the shorter run's
    end."""
    base, done = resumed
    assert done[6].error == ""
    longer, alone = chain.rows(base / "longer"), chain.rows(base / "gipo_long")
    longer[3] = {k: v for k, v in longer[3].items() if not k.startswith("eval/")}
    assert longer == alone
    assert os.readlink(base / "longer" / "final") == "checkpoints/step_5"
