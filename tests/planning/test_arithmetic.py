"""From prompts to optimizer steps, by hand."""

from __future__ import annotations

from gipo_megatron.planning.arithmetic import BatchPlan


def test_ppo_by_hand() -> None:
    batch = BatchPlan(
        replicas=4,
        rows=256,
        sequences_per_row=1,
        minibatch=64,
        micro_batch=2,
        epochs=2,
        prompts=64,
        responses=4,
        max_length=512,
        max_response=128,
    )
    assert (
        batch.updates,
        batch.slots,
        batch.rows_per_replica,
        batch.scoring_slots,
        batch.tokens,
    ) == (8, 8, 64, 32, 131072)
    assert batch.lines() == [
        "64 prompts × 4 responses = 256 sequences an iteration",
        "256 sequences / 4 replicas = 64 each, of at most 512 tokens",
        "64 sequences an optimizer step = 4 replicas × 8 micro-batches of 2",
        "2 epochs × 256 / 64 = 8 optimizer steps an iteration, of each model that is trained",
    ]


def test_pairs_are_two_sequences() -> None:
    batch = BatchPlan(1, 6, 2, 6, 4, 1, None, 4, 100, 50)
    assert (batch.sequences, batch.tokens, batch.scoring_slots, batch.updates) == (12, 1200, 2, 1)
    assert batch.lines()[0] == "6 pairs / 1 replica = 6 each, of at most 100 tokens"
