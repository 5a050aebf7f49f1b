"""Prompts and responses become a rollout: by hand."""

from __future__ import annotations

import torch

from gipo_megatron.rollouts import join
from gipo_megatron.types import Prompts

PAD, END = 9, 5


def test_rows_are_joined_and_padded_on_the_right() -> None:
    """Three prompts of 2, 1 and 3 tokens; the responses end by an end token, by another one, and at
    the limit."""
    prompts = Prompts(
        tokens=torch.tensor([[1, 2, PAD], [3, PAD, PAD], [4, 4, 4]]),
        lengths=torch.tensor([2, 1, 3]),
        prompt_id=torch.tensor([7, 8, 9]),
        sample_id=torch.tensor([70, 80, 90]),
        source=("a", "b", "a"),
        extras=({}, {"x": 1}, {}),
    )
    found = join(
        prompts,
        responses=torch.tensor([[6, END, 0], [4, 0, 0], [6, 7, 8]]),
        counts=torch.tensor([2, 1, 3]),
        logprobs=torch.tensor([[-1.0, -2.0, 5.0], [-3.0, 5.0, 5.0], [-4.0, -5.0, -6.0]]),
        end_ids=[END, 4],
        pad_id=PAD,
        decode=lambda ids: " ".join(map(str, ids)),
    )
    assert found.tokens.tolist() == [
        [1, 2, 6, END, PAD, PAD],
        [3, 4, PAD, PAD, PAD, PAD],
        [4, 4, 4, 6, 7, 8],
    ]
    assert found.mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert found.generation_logprobs is not None
    assert found.generation_logprobs.tolist() == [
        [0, 0, -1, -2, 0, 0],
        [0, -3, 0, 0, 0, 0],
        [0, 0, 0, -4, -5, -6],
    ]
    assert found.finished.tolist() == [True, True, False]
    assert found.response_text == ("6", "", "6 7 8")
    assert found.lengths.tolist() == [4, 2, 6]
    assert (found.sample_id.tolist(), found.source) == ([70, 80, 90], ("a", "b", "a"))


def test_no_rows_are_no_rollout() -> None:
    none = torch.zeros(0, dtype=torch.long)
    prompts = Prompts(none.reshape(0, 1), none, none, none, (), ())
    rows = none.reshape(0, 4)
    found = join(prompts, rows, none, rows.float(), [END], PAD, decode=str)
    assert found.tokens.shape == (0, 0) and len(found) == 0
