"""NaN and infinity in the numbers of a step: no update, the rows named in alerts.jsonl, the same at
all layouts; after `run.max_skipped` such steps the run ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.faults import runs, world
from tools.faults.state import failed
from tools.faults.systems import LAYOUTS
from tools.faults.trial import Bench, Trial, expect

LINE = "NaN or infinity in the numbers of a step"
SURVIVED = {
    LINE: "no update, the row and the kind of number named, the same at all layouts; the next step"
    " is sound; three such steps end the run with exit code 2"
}
ROW = 19  # a response of the second step, of 16 responses each
VALUES = {"NaN": torch.nan, "infinity": torch.inf}
# what is not finite -> role, its method, the part of its result
NUMBERS: dict[str, tuple[str, str, str]] = {
    "scores": ("MegatronRewardModel", "score", ""),
    "log probs": ("MegatronActor", "logprobs", "logprobs"),
    "reference log probs": ("MegatronReference", "logprobs", "logprobs"),
    "values": ("MegatronCritic", "evaluate", "values"),
    "group logits": ("MegatronCritic", "evaluate", "group_logits"),
}
GIPO = ("run.eval_every=0", "run.save_every=1", "run.keep=9")


def trials() -> list[Trial]:
    every = Trial(LINE, "scores of every step", _every_step)
    drawn = [
        Trial(LINE, f"logits of a response, {layout}", partial(_drawn, layout))
        for layout in LAYOUTS
    ]
    return [*_numbers(), *_losses(), *drawn, every]


def _numbers() -> Iterator[Trial]:
    for number in NUMBERS:
        for layout in LAYOUTS:
            kind = "infinity" if layout == "TP 2" else "NaN"
            case = f"{kind} in {number}, {layout}"
            message = f"step 2: no update, {number} that are not finite; rows {ROW}"
            poison = partial(_poisoned, number, VALUES[kind])
            yield Trial(LINE, case, partial(_skipped, poison, message, layout))


def _losses() -> Iterator[Trial]:
    for role in ("actor", "critic"):
        for layout in LAYOUTS:
            message = f"step 2: {role} not updated, non-finite loss or gradient; rows "
            poison = partial(_poisoned_loss, f"{role}_loss")
            yield Trial(
                LINE, f"{role}'s loss, {layout}", partial(_skipped, poison, message, layout)
            )


def _skipped(poison: Callable[[int], None], message: str, layout: str, bench: Bench) -> None:
    """Run three steps, of which the second has the row."""
    done = _run(bench, layout, poison)
    expect(done.code == 0, done.tail())
    alerts = _alerts(bench)
    named = [alert for alert in alerts if alert.startswith(message)]
    expect(len(named) == 1, f"alerts: {alerts}")
    if message.endswith(str(ROW)):
        expect(named == [message], named[0])
    rows = runs.rows(bench.folder / "run")
    expect([row["step"] for row in rows] == [1, 2, 3], f"{len(rows)} rows")
    for name in ("policy/loss", "value/loss"):
        expect(rows[2].get(name) is not None, f"{name} of the next step")


def _every_step(bench: Bench) -> None:
    """The run ends, and its newest checkpoint is the last one before; without the fault it goes
    on."""
    done = _run(bench, "1 process", _poisoned_scores, "run.steps=5")
    expect(done.codes == (2,) and "Traceback" not in done.stderr, done.tail())
    said = "3 steps in a row had a number that is not finite (step 3: no update, scores"
    expect(done.stderr.startswith(said), done.tail())
    again = _run(bench, "1 process", None, "run.steps=5")
    expect(again.code == 0, again.tail())


def _drawn(layout: str, bench: Bench) -> None:
    """No token can be drawn: the run ends at once. Of two replicas one has the fault."""
    ranks, words = LAYOUTS[layout]
    command = ["train", *runs.ppo("gipo", Path("run"), runs.trained(bench.base), *GIPO, *words)]
    only = ranks - 1 if layout == "DP 2" else None
    text = failed(bench, command, ranks, partial(_poisoned_logits, only))
    expect(text.startswith("generation: the model's logits are not finite for samples"), text)


def _run(
    bench: Bench, layout: str, poison: Callable[[int], None] | None, *more: str
) -> world.Finished:
    ranks, words = LAYOUTS[layout]
    base = runs.trained(bench.base)
    command = ["train", *runs.ppo("gipo", Path("run"), base, *GIPO, *words, *more)]
    return world.run(world.GIPO, *command, ranks=ranks, folder=bench.folder, before=poison)


def _alerts(bench: Bench) -> list[str]:
    file = bench.folder / "run" / "alerts.jsonl"
    return [json.loads(line)["message"] for line in file.read_text(encoding="utf-8").splitlines()]


# ---------- faults, in the process that is broken


def _poisoned(number: str, value: float, rank: int) -> None:
    """Let a role's method return `value` in every number of ROW."""
    from gipo_megatron.megatron import roles

    kind, name, part = NUMBERS[number]
    role = getattr(roles, kind)
    method: Any = getattr(role, name)

    def patched(self: Any, batch: Any, *arguments: Any) -> Any:
        output = method(self, batch, *arguments)
        found = getattr(output, part) if part else output
        bad = (batch.row_ids == ROW).reshape([-1, *[1] * (found.dim() - 1)])
        changed = found.masked_fill(bad, value)
        return replace(output, **{part: changed}) if part else changed

    setattr(role, name, patched)


def _poisoned_loss(name: str, rank: int) -> None:
    """Let the loss of ROW's micro-batch be NaN."""
    from gipo_megatron.algorithms.ppo import PPO

    method: Any = getattr(PPO, name)

    def patched(self: PPO, output: Any, batch: Any) -> Any:
        loss = method(self, output, batch)
        factor = torch.nan if (batch.row_ids == ROW).any() else 1.0
        terms = {key: (total * factor, unit) for key, (total, unit) in loss.terms.items()}
        return replace(loss, terms=terms)

    setattr(PPO, name, patched)


def _poisoned_logits(only: int | None, rank: int) -> None:
    """Let all logits be NaN, on rank `only` or on all ranks, from the third token on."""
    from gipo_megatron.megatron import decode_loop

    pick: Any = decode_loop.pick
    calls: list[int] = []

    def patched(logits: torch.Tensor, *arguments: Any) -> Any:
        calls.append(1)
        late = len(calls) > 2 and only in (None, rank)
        return pick(logits * torch.nan if late else logits, *arguments)

    decode_loop.pick = patched  # type: ignore[assignment]


def _poisoned_scores(rank: int) -> None:
    from gipo_megatron.megatron.roles import MegatronRewardModel

    method = MegatronRewardModel.score

    def patched(self: MegatronRewardModel, batch: Any) -> torch.Tensor:
        return method(self, batch) * torch.nan

    MegatronRewardModel.score = patched  # type: ignore[method-assign]
