"""Expected numbers: by hand, by brute force over a small vocabulary, and from Hugging Face's logits
processors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import sampling as module
from gipo_megatron.megatron.sampling import check_sampling, draw, penalise, pick, truncate, uniforms
from gipo_megatron.specs import Sampling


def _logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def _distribution(
    logits: list[float], sampling: Sampling, seen: list[int], points: int = 20000
) -> torch.Tensor:
    """Frequencies over an even grid of uniforms: exact to 1 / points."""
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, seen] = True
    tokens, _ = pick(
        torch.tensor([logits]).expand(points, -1), sampling, grid, mask.expand(points, -1)
    )
    return torch.bincount(tokens, minlength=len(logits)) / points


def test_distribution_by_hand() -> None:
    """Probabilities 8, 4, 2, 2 of 16, worked out with pencil and paper."""
    logits = [math.log(x) for x in (8, 4, 2, 2)]
    root = math.sqrt(2)
    cases = {
        Sampling(1): [8, 4, 2, 2],
        Sampling(1, temperature=0.5): [64, 16, 4, 4],
        Sampling(1, top_k=1): [1, 0, 0, 0],
        Sampling(1, top_k=2): [2, 1, 0, 0],
        Sampling(1, top_k=3): [8, 4, 2, 2],  # the fourth ties with the third
        Sampling(1, top_p=0.49): [1, 0, 0, 0],
        Sampling(1, top_p=0.51): [2, 1, 0, 0],
        Sampling(1, top_p=0.8): [4, 2, 1, 0],  # of the tied two the lower id stays
        Sampling(1, top_p=0.6, top_k=2): [1, 0, 0, 0],  # after top-k the first token has 2/3
        # after the temperature the first two hold 63 %
        Sampling(1, temperature=2.0, top_p=0.65): [2 * root, 2, root, 0],
        Sampling(1, repetition_penalty=2.0): [2 * root, 4, 2, 2],  # token 0 was seen
    }
    checked = 0
    for sampling, weights in cases.items():
        expected = torch.tensor(weights, dtype=torch.float32) / sum(weights)
        torch.testing.assert_close(
            _distribution(logits, sampling, [0]), expected, atol=2e-4, rtol=0
        )
        checked += 1
    assert checked == 11


def test_distribution_of_hugging_face() -> None:
    """Every combination against HF's processors in HF's order, over the whole distribution."""
    logits, checked = _logits(1, 13), 0
    prompt = torch.tensor([[3, 3, 7, 12]])
    for temperature, top_k, top_p, penalty in itertools.product(
        (1.0, 0.7, 1.6), (0, 1, 5, 13, 50), (1.0, 0.9, 0.3), (1.0, 1.3, 0.8)
    ):
        scores = (
            RepetitionPenaltyLogitsProcessor(penalty)(prompt, logits.clone())
            if penalty != 1
            else logits
        )
        scores = (
            TemperatureLogitsWarper(temperature)(prompt, scores) if temperature != 1 else scores
        )
        scores = TopKLogitsWarper(top_k)(prompt, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(prompt, scores) if top_p < 1 else scores
        sampling = Sampling(
            1, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
        )
        ours = _distribution(logits[0].tolist(), sampling, [3, 7, 12], points=5000)
        torch.testing.assert_close(ours, scores.softmax(-1)[0], atol=8e-4, rtol=0)
        checked += 1
    assert checked == 135


def test_truncation_of_hugging_face_on_a_large_vocabulary() -> None:
    logits, ids = _logits(8, 5000), torch.zeros(8, 1, dtype=torch.long)
    kept = []
    for top_k, top_p in ((0, 0.9), (40, 1.0), (40, 0.5), (5000, 0.2)):
        scores = TopKLogitsWarper(top_k)(ids, logits) if top_k else logits
        expected = TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores
        ours = truncate(logits, top_k, top_p)
        # HF sums in float32: a token on the border may differ
        assert (ours.isinf() != expected.isinf()).sum() <= 1
        kept.append(int(ours.isfinite().sum()))
    assert kept[1] == 8 * 40 and kept[2] < kept[1] < kept[0]


def test_top_p_breaks_ties_by_token_id() -> None:
    ours = truncate(torch.zeros(2, 10), 0, 0.3)
    assert ours.isfinite().nonzero()[:, 1].tolist() == [0, 1, 2] * 2


def test_penalty_by_hand() -> None:
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), seen, 2.0).tolist() == [
        [1.0, -4.0, 2.0, -2.0]
    ]


def test_greedy_takes_the_largest_and_penalises() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = pick(logits, Sampling(1, temperature=0.0), torch.zeros(1), None)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])
    seen = torch.tensor([[False, True, False]])
    tokens, logprobs = pick(
        logits, Sampling(1, temperature=0.0, repetition_penalty=2.0), torch.zeros(1), seen
    )
    assert tokens.tolist() == [2]
    penalised = torch.tensor([[1.0, 1.5, 2.0]])
    torch.testing.assert_close(logprobs, penalised.log_softmax(-1)[:, 2])


def test_logprob_is_of_the_distribution_drawn_from() -> None:
    """Against HF's processors: `rollout/logprob_gap` shows a truncation."""
    logits, uniform = _logits(50, 30), torch.linspace(0, 0.999, 50, dtype=torch.float64)
    ids, checked = torch.zeros(50, 1, dtype=torch.long), 0
    for sampling, warpers in (
        (Sampling(1), []),
        (
            Sampling(1, temperature=0.5, top_k=5),
            [TemperatureLogitsWarper(0.5), TopKLogitsWarper(5)],
        ),
        (
            Sampling(1, temperature=1.5, top_p=0.6),
            [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.6)],
        ),
    ):
        tokens, logprobs = pick(logits, sampling, uniform, None)
        scores = logits
        for warper in warpers:
            scores = warper(ids, scores)
        expected = scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)
        checked += 1
    assert checked == 3


def test_zero_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, -1)
    edges = torch.tensor([0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges)[0].tolist() == [1, 1, 3, 3]


def test_draw_ends_of_the_interval_for_many_totals() -> None:
    logits = _logits(3000, 7)
    logits[:, -1] = float("-inf")
    top = draw(logits, torch.full((3000,), 1 - 2**-53, dtype=torch.float64))[0]
    assert top.max() == 5 and draw(logits, torch.zeros(3000, dtype=torch.float64))[0].max() == 0


def test_frequencies_of_real_noise() -> None:
    """20,000 samples of 4 tokens within 4 standard errors, through the same noise as generation."""
    noise = uniforms(Sampling(1, seed=3), torch.arange(20000))[:, 0]
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    counts = torch.bincount(draw(p.log().expand(20000, -1), noise)[0], minlength=4)
    assert ((counts / 20000 - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all()


def test_noise_depends_on_seed_step_and_sample_only() -> None:
    ids = torch.tensor([5, 900, 2**40])
    base = uniforms(Sampling(20, seed=1, step=2), ids)
    assert (
        base.shape == (3, 20) and base.dtype == torch.float64 and base.min() >= 0 and base.max() < 1
    )
    torch.testing.assert_close(
        uniforms(Sampling(20, seed=1, step=2), ids[[2, 0]]), base[[2, 0]], atol=0, rtol=0
    )
    torch.testing.assert_close(
        uniforms(Sampling(7, seed=1, step=2), ids), base[:, :7], atol=0, rtol=0
    )
    others = [
        uniforms(Sampling(20, seed=2, step=2), ids),
        uniforms(Sampling(20, seed=1, step=3), ids),
        uniforms(Sampling(20, seed=1, step=2), ids + 1),
    ]
    assert len(others) == 3 and not any((o == base).any() for o in others)
    assert len(base.unique()) == 60
    reference = np.random.Generator(
        np.random.Philox(key=np.array([1, 2], dtype=np.uint64), counter=[0, 0, 900, 0])
    ).random(20)
    assert base[1].tolist() == reference.tolist()


def test_rows_in_blocks_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, noise, checked = _logits(7, 50), torch.linspace(0, 0.99, 7).double(), 0
    seen = _logits(7, 50, seed=1) > 1
    for sampling in (
        Sampling(1),
        Sampling(1, temperature=0.0),
        Sampling(1, temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.3),
    ):
        whole = pick(logits, sampling, noise, seen)
        for size in (1, 100, 149, 150, 350):  # of logits: 1, 2, 2, 3 and 7 rows
            monkeypatch.setitem(module._LOGITS, "cpu", size)
            for found, expected in zip(pick(logits, sampling, noise, seen), whole, strict=True):
                assert torch.equal(found, expected)
                checked += 1
        monkeypatch.undo()
    assert checked == 3 * 5 * 2


def test_not_finite_logits_are_marked() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    logits[2, 0] = float("inf")
    for temperature in (0.0, 1.0):
        assert (
            pick(
                logits,
                Sampling(1, temperature=temperature),
                torch.zeros(3, dtype=torch.float64),
                None,
            )[0]
            < 0
        ).tolist() == [
            False,
            True,
            True,
        ]


def test_bad_sampling_names_every_field() -> None:
    with pytest.raises(UserError) as error:
        check_sampling(Sampling(0, temperature=-1.0, top_k=-1, top_p=0.0, repetition_penalty=0.0))
    for name in ("max_response", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert name in str(error.value)
    check_sampling(Sampling(1, temperature=0.0))
