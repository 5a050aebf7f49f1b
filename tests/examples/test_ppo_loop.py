"""The example learns both halves of the prompts, within its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import ppo_loop


def test_it_learns_easy_and_hard_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that draws uniformly scores 0.4 on easy prompts and 0.1 on hard ones."""
    scores = ppo_loop.train(60)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6 and all("easy / hard" in line for line in shown)
    assert scores["easy"] > 0.7 and scores["hard"] > 0.7


def test_it_is_one_short_file() -> None:
    assert len(Path(ppo_loop.__file__).read_text(encoding="utf-8").splitlines()) <= 150
