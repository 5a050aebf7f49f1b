"""One process: what an update counts, divides and reports. Layouts and gradients are in
tests/parity/test_training.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gipo_megatron.megatron import engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.metrics import Metric
from gipo_megatron.types import Loss, Sequences, TokenStats
from tests.parity.roles import digest, new_actor, new_critic
from tests.parity.tiny import ARCHITECTURE, RAGGED, language_loss, ppo_loss, pretraining, weighted
from tests.watch import Reads

pytestmark = pytest.mark.global_rng


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_metrics_merge_over_micro_batches(mesh: Mesh, micro_batch: int) -> None:
    rows = weighted()
    actor = new_actor(mesh, micro_batch=micro_batch)
    ratio = (actor.logprobs(rows).logprobs - rows.old).exp()[rows.inner.mask]
    update = actor.update((rows, ppo_loss))
    assert update.skipped is None
    found = {name: metric.result() for name, metric in update.metrics.items()}
    assert found.keys() == {"ratio_max", "ratio", "rows", "grad_norm", "learning_rate"}
    assert found["rows"] == 8 and found["learning_rate"] == 5e-4  # the first of two warm-up steps
    assert found["ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-5)
    assert found["ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)


def test_padding_is_counted_pass_by_pass(mesh: Mesh) -> None:
    """Rows of 12 8 16 10 4 19 11 8 tokens in micro-batches of three: 3 × 19, 3 × 11, 2 × 8; of 48
    tokens: 2 × 19, 3 × 12, 3 × 8 by hand."""
    seen: list[tuple[str, int, int]] = []
    actor = new_actor(mesh, micro_batch=3, count=lambda *numbers: seen.append(numbers))
    actor.logprobs(weighted())
    actor.engine.micro_batch, actor.engine.micro_tokens = None, 48
    actor.update((weighted(), ppo_loss))
    assert seen == [("forward", 88, 57 + 33 + 16), ("update", 88, 38 + 36 + 24)]


def test_each_term_is_divided_by_its_own_count(mesh: Mesh) -> None:
    """A sum over tokens, or over sequences, of the same quantity differ by the ratio of the
    counts."""

    def loss(unit: str, factor: float):  # type: ignore[no-untyped-def]
        return lambda output, rows: Loss(
            {"x": (factor * (output.logprobs * rows.inner.mask).sum(), unit)}
        )

    norms = []
    for unit, factor in (("token", 1.0), ("sequence", len(RAGGED) / sum(r for _, r in RAGGED))):
        norms.append(
            new_actor(mesh).update((weighted(), loss(unit, factor))).metrics["grad_norm"].result()
        )
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_parts_have_counts_of_their_own(mesh: Mesh) -> None:
    """The same rows given twice, half the loss each, are the same update as once; the second part
    has other widths."""
    text = pretraining()

    def half(output, rows) -> Loss:
        return Loss({"ptx": (0.5 * language_loss(output, rows).terms["ptx"][0], "token")})

    wide = Sequences(
        *(torch.nn.functional.pad(x, (0, 3)) for x in (text.tokens, text.mask)),
        text.prompt_lengths,
        text.lengths,
        text.ids,
    )
    once, twice = new_actor(mesh), new_actor(mesh)
    a, b = once.update((text, language_loss)), twice.update((text, half), (wide, half))
    assert a.metrics["grad_norm"].result() == pytest.approx(
        b.metrics["grad_norm"].result(), rel=1e-5
    )


def test_a_constant_loss_is_a_step_of_nothing(mesh: Mesh) -> None:
    def constant(output: TokenStats, rows: Sequences) -> Loss:
        return Loss({"nothing": (torch.zeros(()), "token")}, {"seen": Metric.sum(1.0)})

    actor = new_actor(mesh)
    before = digest(actor)
    update = actor.update((pretraining(), constant))
    assert update.metrics["grad_norm"].result() == 0.0 and update.metrics["seen"].result() == 2.0
    assert digest(actor) == before


def test_the_version_counts_changes_of_the_weights(mesh: Mesh) -> None:
    """Steps that were taken, and loaded weights; not a forward pass, not a skipped step."""

    def broken(output: TokenStats, rows: Sequences) -> Loss:
        return Loss({"x": (output.logprobs.sum() * float("nan"), "token")})

    actor = new_actor(mesh)
    seen = [actor.version]
    for action in (
        lambda: actor.logprobs(pretraining()),
        lambda: actor.update((pretraining(), language_loss)),
        lambda: actor.update((pretraining(), broken)),
        lambda: actor.update((pretraining(), language_loss)),
        lambda: actor.engine.weights_changed(),
    ):
        action()
        seen.append(actor.version)
    assert [b - a for a, b in pairwise(seen)] == [0, 1, 0, 1, 1]


def test_no_rows_is_an_error(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="without rows"):
        new_actor(mesh).update((pretraining().block(0, 0), language_loss))


def test_values_are_read_once_an_update_not_once_a_micro_batch(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan, which is made on the host: whether there were tokens (mcore), the gradient's
    norm, whether to skip."""
    rows, counts = weighted(), []
    for micro_batch in (8, 1):
        actor = new_actor(mesh, micro_batch=micro_batch)
        slots = actor.engine._slots([(rows, ppo_loss)])
        monkeypatch.setattr(actor.engine, "_slots", lambda parts, slots=slots: slots)
        with Reads() as reads:
            actor.update((rows, ppo_loss))
        counts.append((len(slots), reads.count))
    (_, once), (_, eight_times) = counts
    assert [slots for slots, _ in counts] == [1, 8] and once == eight_times
    assert once in (2, 3), "mcore 0.19 no longer reads whether there were tokens"


def test_an_engine_on_a_gpu_pads_to_round_widths(mesh: Mesh) -> None:
    """The meta device stands for the GPU: sequences of 19 tokens and less in micro-batches of
    64."""
    engine = new_actor(mesh, micro_batch=3).engine
    assert [slot.sequences.tokens.shape[1] for slot in engine._plan(weighted())] == [19, 11, 8]
    engine.mesh = replace(mesh, device=torch.device("meta"))
    slots = engine._plan(weighted())
    assert [slot.sequences.tokens.shape[1] for slot in slots] == [64] * 3 and all(
        slot.rows.old.is_meta for slot in slots
    )


def test_padding_beyond_the_models_positions_changes_nothing(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions, sequences of 19 tokens, padded to 128: what a GPU's round widths may do to a
    model of few positions."""
    actor, critic = new_actor(mesh), new_critic(mesh)
    plain, values = actor.logprobs(weighted(), entropy=True), critic.evaluate(weighted())
    assert ARCHITECTURE.max_positions == 64
    monkeypatch.setattr(engine, "length_multiple", lambda precision, parallel: 128)
    assert [slot.sequences.tokens.shape[1] for slot in actor.engine._plan(weighted())] == [128] * 4
    padded, wide = actor.logprobs(weighted(), entropy=True), critic.evaluate(weighted())
    for a, b in (
        (plain.logprobs, padded.logprobs),
        (plain.entropy, padded.entropy),
        (values.values, wide.values),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    # the head's first weights are 1.9 times as large as at width 128
    torch.testing.assert_close(values.group_logits, wide.group_logits, atol=4e-6, rtol=0)
