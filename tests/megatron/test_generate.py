"""One process: against Hugging Face, and against itself under other slicings. Layouts of several
processes are in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import decode_loop
from gipo_megatron.megatron.decode_loop import Pace
from gipo_megatron.megatron.kv_budget import PREFILL_TOKENS
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Architecture, Sampling
from gipo_megatron.types import Rollout
from tests.parity import families
from tests.parity.generation_cases import (
    GREEDY,
    NEVER,
    PAD,
    SAMPLINGS,
    STEPS,
    frequent,
    hf_greedy,
    load,
    prompts,
    respond,
    responses,
)


@pytest.fixture(scope="module")
def llama(mesh: Mesh) -> tuple[list[nn.Module], Architecture]:
    return load("llama", mesh)


def test_a_response_ends_at_any_of_several_tokens(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture]
) -> None:
    reference, rows = families.hf_model("llama"), prompts("ragged")
    endless = hf_greedy(reference, rows, None)
    first = frequent(endless)
    second = frequent([row for row in endless if first not in row])
    stopped = hf_greedy(reference, rows, [first, second])
    for ends in ([first, second], [second, NEVER, first]):
        rollout = respond(*llama, mesh, rows, GREEDY, ends)
        assert responses(rollout) == stopped
        assert rollout.finished.tolist() == [row[-1] in ends for row in stopped]
        # the text is without the end token, whichever it was
        texts = [row[:-1] if row[-1] in ends else row for row in stopped]
        assert list(rollout.response_text) == [" ".join(map(str, text)) for text in texts]
    last = {row[-1] for row in stopped}
    assert {first, second} <= last, "each of the two ends a row"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_greedy_is_hugging_faces(mesh: Mesh, family: str) -> None:
    chunks, architecture = load(family, mesh)
    reference = families.hf_model(family)
    checked = 0
    for kind in ("equal", "ragged"):
        rows = prompts(kind)
        endless = hf_greedy(reference, rows, None)
        assert responses(respond(chunks, architecture, mesh, rows, GREEDY, NEVER)) == endless
        eos = frequent(endless)
        stopped = hf_greedy(reference, rows, eos)
        rollout = respond(chunks, architecture, mesh, rows, GREEDY, eos)
        assert responses(rollout) == stopped
        assert (
            rollout.finished.tolist() == [row[-1] == eos for row in stopped]
            and rollout.finished.any()
        )
        if kind == "equal":  # of ragged prompts HF penalises the padding too
            penalised = replace(GREEDY, repetition_penalty=1.3)
            assert responses(
                respond(chunks, architecture, mesh, rows, penalised, NEVER)
            ) == hf_greedy(reference, rows, None, 1.3)
        checked += 1
    assert checked == 2


@pytest.mark.parametrize("name", SAMPLINGS)
def test_logprobs_are_of_the_distribution_drawn_from(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture], name: str
) -> None:
    """By transformers' own processors, at each response token."""
    rows, sampling = prompts("ragged"), SAMPLINGS[name]
    rollout = respond(*llama, mesh, rows, sampling, NEVER)
    processors = (
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k or llama[1].vocab_size),
        TopPLogitsWarper(sampling.top_p),
    )
    with torch.no_grad():
        logits = families.hf_model("llama")(rollout.tokens).logits
    expected = torch.zeros(rollout.tokens.shape)
    for row, at in rollout.mask.nonzero().tolist():
        scores = logits[row, at - 1 : at]
        for process in processors:
            scores = process(rollout.tokens[row : row + 1, :at], scores)
        expected[row, at] = scores.log_softmax(-1)[0, rollout.tokens[row, at]]
    assert rollout.generation_logprobs is not None and int(rollout.mask.sum()) == len(rows) * STEPS
    torch.testing.assert_close(rollout.generation_logprobs, expected, atol=2e-5, rtol=0)


def test_sampled_tokens_follow_the_models_distribution(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture]
) -> None:
    """First token of 3000 samples of one prompt, the ten likeliest tokens within 4 standard errors
    of HF's probabilities."""
    row, n = prompts("equal").block(0, 1), 3000
    many = replace(row.select(torch.zeros(n, dtype=torch.long)), sample_id=torch.arange(n))
    first = torch.tensor(responses(respond(*llama, mesh, many, Sampling(1), NEVER)))[:, 0]
    with torch.no_grad():
        p, ids = families.hf_model("llama")(row.tokens).logits[0, -1].softmax(-1).topk(10)
    share = torch.stack([(first == i).float().mean() for i in ids])
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_rows_do_not_depend_on_the_rows_beside_them(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, reordered, in cache slices, in prefill blocks, with rows that have ended kept or
    dropped at once: the same responses."""
    rows, checked = prompts("ragged"), 0
    for sampling in (*SAMPLINGS.values(), GREEDY):
        eos = frequent(responses(respond(*llama, mesh, rows, sampling, NEVER)))
        base = responses(respond(*llama, mesh, rows, sampling, eos))
        assert len({len(row) for row in base}) > 1
        for i in range(len(rows)):
            assert responses(respond(*llama, mesh, rows.block(i, i + 1), sampling, eos)) == [
                base[i]
            ]
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        assert responses(respond(*llama, mesh, rows.select(order), sampling, eos)) == [
            base[i] for i in order
        ]
        # key and value, layers, groups, width, fp32, slots
        row_bytes = 2 * 4 * 2 * 8 * 4 * (12 + STEPS)
        for cache in (1, 2 * row_bytes, 4 * row_bytes):
            assert responses(respond(*llama, mesh, rows, sampling, eos, cache)) == base
        with monkeypatch.context() as patch:
            patch.setitem(PREFILL_TOKENS, "cpu", 24)
            for pace in (Pace(1, 1, 0.999), Pace(1, 1000, 0.0), Pace(5, 8, 0.5)):
                patch.setitem(decode_loop.PACES, "cpu", pace)
                assert responses(respond(*llama, mesh, rows, sampling, eos)) == base
        checked += 1
    assert checked == 3


def test_noise_is_keyed_by_sample_seed_and_step(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture]
) -> None:
    rows, sampling = prompts("equal"), SAMPLINGS["plain"]
    base = responses(respond(*llama, mesh, rows, sampling, NEVER))
    assert responses(respond(*llama, mesh, rows, sampling, NEVER)) == base
    shorter = responses(respond(*llama, mesh, rows, replace(sampling, max_response=5), NEVER))
    assert shorter == [row[:5] for row in base]
    others = [replace(sampling, seed=6), replace(sampling, step=4)]
    assert all(responses(respond(*llama, mesh, rows, other, NEVER)) != base for other in others)
    moved = respond(*llama, mesh, replace(rows, sample_id=rows.sample_id + 1), sampling, NEVER)
    assert responses(moved) != base


def test_fields_of_the_rollout(mesh: Mesh, llama: tuple[list[nn.Module], Architecture]) -> None:
    rows = prompts("ragged")
    eos = frequent(responses(respond(*llama, mesh, rows, GREEDY, NEVER)))
    rollout = respond(*llama, mesh, rows, GREEDY, eos)
    answers = responses(rollout)
    assert (
        rollout.tokens.shape
        == rollout.mask.shape
        == (6, max(n + len(a) for n, a in zip(rows.lengths.tolist(), answers, strict=True)))
    )
    for i, answer in enumerate(answers):
        n = int(rows.lengths[i])
        expected = rows.tokens[i, :n].tolist() + answer
        assert rollout.tokens[i].tolist() == expected + [PAD] * (
            rollout.tokens.shape[1] - len(expected)
        )
        assert rollout.mask[i].nonzero()[:, 0].tolist() == list(range(n, n + len(answer)))
        text = answer[:-1] if answer[-1] == eos else answer
        assert rollout.response_text[i] == " ".join(map(str, text))
    assert (
        rollout.generation_logprobs is not None
        and not rollout.generation_logprobs[~rollout.mask].any()
    )
    assert (
        rollout.generation_logprobs[rollout.mask].max() < 0
        and not rollout.generation_logprobs.is_inference()
    )
    assert not rollout.tokens.is_inference()
    assert (
        rollout.prompt_id.tolist() == rows.prompt_id.tolist()
        and rollout.source == rows.source
        and rollout.extras == rows.extras
    )


def test_training_goes_on_after_generating(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture]
) -> None:
    rollout: Rollout = respond(*llama, mesh, prompts("equal"), GREEDY, NEVER)
    llama[0][0](rollout.tokens, None, None).square().mean().backward()
    named = dict(llama[0][0].named_parameters())
    named.pop("output_layer.weight")  # the chunk's outputs are hidden states
    grads = [p.grad for p in named.values()]
    assert len(grads) > 20 and all(g is not None and g.isfinite().all() for g in grads)
    llama[0][0].zero_grad()


def test_no_rows(mesh: Mesh, llama: tuple[list[nn.Module], Architecture]) -> None:
    assert len(respond(*llama, mesh, prompts("equal").block(0, 0), GREEDY, NEVER)) == 0


def test_errors(mesh: Mesh) -> None:
    chunks, architecture = load("llama", mesh)
    with pytest.raises(
        UserError, match=r"prompt of 12 tokens \+ max_response 60 > the model's 64 positions"
    ):
        respond(chunks, architecture, mesh, prompts("ragged"), Sampling(60), NEVER)
    with pytest.raises(UserError, match="top_p 0"):
        respond(chunks, architecture, mesh, prompts("ragged"), Sampling(4, top_p=0.0), NEVER)
    empty = replace(prompts("ragged"), lengths=torch.tensor([3, 9, 0, 12, 5, 12]))
    with pytest.raises(ValueError, match="empty prompts: samples \\[7002\\]"):
        respond(chunks, architecture, mesh, empty, GREEDY, NEVER)
    chunks[0].output_layer.weight.data[3, 0] = float("nan")
    with pytest.raises(UserError, match="not finite for samples"):
        respond(chunks, architecture, mesh, prompts("ragged"), GREEDY, NEVER)
