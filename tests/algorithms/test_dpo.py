"""DPO's losses by hand and against autograd on whole sequences; a reference that is asked once says
what a live one does."""

from __future__ import annotations

import contextlib
import io
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.algorithms.dpo import DPO
from gipo_megatron.algorithms.pair_reference import (
    LiveReference,
    PrecomputedReference,
    ReferredPairs,
    Split,
)
from gipo_megatron.local.replicas import replica_rows, run_replicas
from gipo_megatron.local.roles import TorchActor
from gipo_megatron.roles import DataParallel, SingleReplica
from gipo_megatron.types import Pairs, Rows, Sequences, TokenStats

ROWS = 6
VARIANTS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.5},
    {"length_normalise": True, "beta": 2.0},
    {"loss": "ipo", "length_normalise": True},
]


def half(seed: int, lengths: Sequence[int]) -> Sequences:
    tokens = torch.randint(1, 9, (ROWS, 6), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(lengths)
    position = torch.arange(6)
    return Sequences(
        tokens,
        (position >= 2) & (position < ends[:, None]),
        torch.full((ROWS,), 2),
        ends,
        torch.arange(ROWS),
    )


def pairs() -> Pairs:
    return Pairs(half(0, [4, 3, 6, 5, 4, 6]), half(1, [6, 4, 3, 5, 6, 4]), ("a",) * ROWS)


def pairs_at(rows: Sequence[int], dp_rank: int, dp_size: int) -> tuple[Pairs, Tensor]:
    """As Dataset.pairs_at: equal counts on all replicas, the last row repeated."""
    per_replica = -(-len(rows) // dp_size)
    mine = [rows[min(i * dp_size + dp_rank, len(rows) - 1)] for i in range(per_replica)]
    return pairs().select(torch.tensor(mine)), torch.ones(per_replica, dtype=torch.bool)


def policy(seed: int = 0, **changes: Any) -> TorchActor:
    return TorchActor(9, hidden=8, seed=seed, init_std=0.5, **changes)


def dpo(reference: Any = None, actor: Any = None, **keys: Any) -> DPO:
    reference = reference or LiveReference(policy(seed=5))
    return DPO(
        **keys,
        actor=actor or policy(),
        reference=reference,
        pairs=lambda step: pairs(),
        timer=lambda name: contextlib.nullcontext(),
    )


def flat(values: list[list[float]]) -> TokenStats:
    """Log-probs at the response tokens of `pairs()`'s first rows, all chosen before all
    rejected."""
    rows = pairs().block(0, len(values) // 2).sequences
    logprobs = torch.zeros(rows.mask.shape)
    logprobs[rows.mask] = torch.tensor([x for row in values for x in row])
    return TokenStats(logprobs, None)


# chosen: 2 tokens and 1; rejected: 4 and 2
SAID = [[-1.0, -2.0], [-1.5], [-2.0, -1.0, -1.0, -2.0], [-0.5, -1.0]]
REFERENCE = torch.tensor([[-4.0, -5.0], [-1.0, -3.0]])  # log-ratios: 1.0, -1.0 and -0.5, 1.5


@pytest.mark.parametrize(
    ("keys", "margins", "losses"),
    [
        ({"beta": 0.5}, [1.0, -1.0], [math.log1p(math.exp(-1)), math.log1p(math.exp(1))]),
        (
            {"beta": 0.5, "label_smoothing": 0.1},
            [1.0, -1.0],
            [
                0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1)),
                0.9 * math.log1p(math.exp(1)) + 0.1 * math.log1p(math.exp(-1)),
            ],
        ),
        ({"beta": 0.5, "loss": "ipo"}, [1.0, -1.0], [1.0, 9.0]),  # (h - 1)^2, h = 2, -2
        (
            {"beta": 1.0, "length_normalise": True},
            [0.75, -1.25],
            [math.log1p(math.exp(-0.75)), math.log1p(math.exp(1.25))],
        ),
    ],
    ids=["sigmoid", "smoothed", "ipo", "mean"],
)
def test_loss_by_hand(keys: dict[str, Any], margins: list[float], losses: list[float]) -> None:
    """Sums of log-ratios h = 2 and -2; means 0.5 + 0.25 = 0.75 and -0.5 - 0.75 = -1.25."""
    batch = ReferredPairs(pairs().block(0, 2), REFERENCE)
    assert batch.response_lengths.tolist() == [[2, 4], [1, 2]]
    loss = dpo(**keys).objective(flat(SAID), batch)
    total, unit = loss.terms["preference"]
    assert (set(loss.terms), unit) == ({"preference"}, "pair")
    assert float(total) == pytest.approx(sum(losses))
    figures = {name: metric.result() for name, metric in loss.metrics.items()}
    assert figures["loss"] == pytest.approx(sum(losses) / 2)
    assert figures["margin"] == pytest.approx(sum(margins) / 2)
    assert figures["accuracy"] == 0.5
    assert figures["chosen_reward"] - figures["rejected_reward"] == pytest.approx(figures["margin"])


def test_rewards_by_hand() -> None:
    figures = (
        dpo(beta=0.5).objective(flat(SAID), ReferredPairs(pairs().block(0, 2), REFERENCE)).metrics
    )
    assert figures["chosen_reward"].result() == pytest.approx(0.5 * (1.0 - 0.5) / 2)
    assert figures["rejected_reward"].result() == pytest.approx(0.5 * (-1.0 + 1.5) / 2)


def test_extreme_margins_are_finite() -> None:
    output = flat([[-1e4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    output.logprobs.requires_grad_()
    total, _ = (
        dpo(beta=1.0)
        .objective(output, ReferredPairs(pairs().block(0, 1), torch.zeros(1, 2)))
        .terms["preference"]
    )
    total.backward()
    assert float(total.detach()) == pytest.approx(1e4)
    assert output.logprobs.grad is not None and output.logprobs.grad.abs().max() == 1.0


def gradients(algorithm: DPO, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of one step. Gradients, not weights after Adam: Adam hides a factor."""
    actor: TorchActor = algorithm.actor  # type: ignore[assignment]
    found: list[Tensor] = []
    monkeypatch.setattr(
        actor._stepper,
        "step",
        lambda dp: found.extend(dp.sum(p.grad) for p in actor.parameters) or 0.0,
    )
    algorithm.step(0)
    return found


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_gradients_are_those_of_the_whole_batch_for_any_micro_batch(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax over whole sequences, written out row by row."""
    actor, reference, batch = policy(), policy(seed=5), pairs()

    def log_ratio(rows: Sequences, i: int) -> Tensor:
        at = torch.arange(6)[rows.mask[i]]
        logps = [
            model.logits(rows.tokens[i : i + 1])[0].log_softmax(-1)[at, rows.tokens[i, at]]
            for model in (actor, reference)
        ]
        difference = logps[0] - logps[1].detach()
        return difference.mean() if keys.get("length_normalise") else difference.sum()

    h = torch.stack(
        [log_ratio(batch.chosen, i) - log_ratio(batch.rejected, i) for i in range(ROWS)]
    )
    beta, eps = keys.get("beta", 0.1), keys.get("label_smoothing", 0.0)
    if keys.get("loss") == "ipo":
        each = (h - 0.5 / beta) ** 2
    else:
        each = (
            -(1 - eps) * (1 / (1 + (-beta * h).exp())).log()
            - eps * (1 / (1 + (beta * h).exp())).log()
        )
    expected = torch.autograd.grad(each.mean(), actor.parameters)
    compared = 0
    for size in (0, 1, 2, 4):
        found = gradients(dpo(actor=policy(micro_batch=size), **keys), monkeypatch)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared == 4 * 4


def test_preferences_are_learnt() -> None:
    start = policy()
    algorithm = dpo(reference=LiveReference(policy()), actor=policy(lr=0.03))
    rows = [algorithm.step(step).metrics for step in range(30)]
    assert rows[0].keys() == {
        f"dpo/{name}"
        for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "grad_norm")
    }
    assert rows[0]["dpo/loss"].result() == pytest.approx(math.log(2)), (
        "the policy is its reference: h = 0"
    )
    assert rows[-1]["dpo/accuracy"].result() == 1.0
    assert rows[-1]["dpo/loss"].result() < 0.5 * rows[0]["dpo/loss"].result()
    before, after = (
        response.logprobs(pairs()).logprobs.sum(1).chunk(2) for response in (start, algorithm.actor)
    )
    assert ((after[0] - before[0]) > (after[1] - before[1])).all()


def test_combinations_that_are_refused() -> None:
    (error,) = DPO(label_smoothing=0.5).problems()
    assert error.what.startswith("0.5 must be below 0.5")
    (error,) = DPO(loss="ipo", label_smoothing=0.1).problems()
    assert error.what == "the ipo loss has no label smoothing"
    assert not list(DPO(loss="ipo").problems())


# ------------------------------------------------------------------------ the reference, asked once


class Counting(TorchActor):
    """A policy that counts the pairs it was asked about."""

    asked = 0

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        self.asked += len(batch)
        return super().logprobs(batch, entropy)


class Maker:
    """Makes references, and remembers each without holding it."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Counting]] = []

    def __call__(self) -> Counting:
        model = Counting(9, hidden=8, seed=5, init_std=0.5)
        self.made.append(weakref.ref(model))
        return model

    @property
    def alive(self) -> int:
        return sum(model() is not None for model in self.made)


def once(
    maker: Any,
    rows: Sequence[int] = range(ROWS),
    held_out: Sequence[int] = (),
    dp: DataParallel | None = None,
    identity: str = "x",
) -> PrecomputedReference:
    splits = {"train": Split(rows, pairs_at), "held_out": Split(held_out, pairs_at)}
    return PrecomputedReference(maker, splits, dp or SingleReplica(), batch=4, identity=identity)


def test_asked_once_says_what_a_live_one_does() -> None:
    maker = Maker()
    reference = once(maker, held_out=[1, 4])
    live = LiveReference(policy(seed=5)).refer("train", pairs())
    for _ in range(2):
        told = reference.refer("train", pairs())
        torch.testing.assert_close(told.reference, live.reference)
        torch.testing.assert_close(
            reference.refer("held_out", pairs_at([4, 1], 0, 1)[0]).reference, live.reference[[4, 1]]
        )
    assert (len(maker.made), maker.alive) == (1, 0)
    algorithms = [
        dpo(reference=live_or_not) for live_or_not in (LiveReference(policy(seed=5)), once(maker))
    ]
    first, second = (
        [algorithm.step(step).metrics for step in range(3)] for algorithm in algorithms
    )
    for mine, its in zip(first, second, strict=True):
        assert {k: m.result() for k, m in mine.items()} == pytest.approx(
            {k: m.result() for k, m in its.items()}, rel=1e-5
        )


def test_resume_asks_nothing_again_and_more_rows_only_for_themselves() -> None:
    maker = Maker()
    first = once(maker, rows=range(4), held_out=[5])
    told = first.refer("train", pairs().block(0, 4)).reference
    state = first.state_dict()

    again = once(maker, rows=range(4), held_out=[5])
    again.load_state_dict(state)
    assert torch.equal(again.refer("train", pairs().block(0, 4)).reference, told)
    assert again.refer("held_out", pairs().block(5, 6)).reference.shape == (1, 2)
    assert len(maker.made) == 1

    asked: list[Counting] = []
    longer = once(
        lambda: asked.append(model := Counting(9, hidden=8, seed=5, init_std=0.5)) or model,
        held_out=[5],
    )
    longer.load_state_dict(state)
    assert torch.equal(longer.refer("train", pairs()).reference[:4], told)
    assert [model.asked for model in asked] == [2]

    other = once(maker, identity="another reference")
    other.load_state_dict(state)
    other.refer("train", pairs())
    assert len(maker.made) == 2
    fresh = once(maker)
    dpo(reference=fresh).load_state_dict(dpo().state_dict())  # a run that was live before
    fresh.refer("train", pairs())
    assert (len(maker.made), maker.alive) == (3, 0)


def test_state_survives_a_checkpoint() -> None:
    """state.pt is read with weights_only: tensors, numbers and strings alone."""
    reference = once(Maker(), held_out=[2])
    reference.refer("train", pairs())
    file = io.BytesIO()
    torch.save(dpo(reference=reference).state_dict(), file)
    file.seek(0)
    restored = once(Maker(), held_out=[2])
    dpo(reference=restored).load_state_dict(torch.load(file, weights_only=True))
    assert restored.sums == reference.sums and len(reference.sums["train"]) == ROWS


@pytest.mark.parametrize("rows", [range(ROWS), [0, 2, 3, 4, 5]], ids=["even", "odd"])
def test_every_replica_knows_all_rows(rows: Sequence[int]) -> None:
    """The table of two replicas is that of one, so a resumed run may have another number of
    them."""
    alone = once(Maker(), rows)
    alone.refer("train", pairs().block(0, 1))

    def work(dp: DataParallel) -> tuple[dict[int, tuple[float, float]], Tensor]:
        reference = once(Maker(), rows, dp=dp)
        mine = replica_rows(pairs().select(torch.tensor(list(rows)[:4])), dp)
        told = reference.refer("train", mine).reference
        return reference.sums["train"], told

    told = run_replicas(2, work)
    for sums, reference in told:
        assert sums.keys() == alone.sums["train"].keys() == set(rows)
        assert all(
            sums[row] == pytest.approx(both, rel=1e-6) for row, both in alone.sums["train"].items()
        )
        assert reference.shape == (2, 2)
