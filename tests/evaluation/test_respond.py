"""An evaluation's responses: the sampler draws them, and every prompt keeps its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.origin import check_origin, origin
from gipo_megatron.evaluation.recipe import Generation, compose_evaluation
from gipo_megatron.evaluation.respond import Responder, ResponseScores, sample_id
from gipo_megatron.evaluation.types import TaskPrompt
from gipo_megatron.roles import SingleReplica
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts, Rollout
from tests.recipe.helpers import RECIPES

GENERATION = Generation(temperature=0.5, top_k=4, top_p=0.7, max_response=3, seed=6)
IDS = {"a": [5, 6], "b": [7]}


class Echo:
    """A sampler that responds with the prompt's first token and an end token."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Sampling]] = []

    def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
        self.calls.append((actor, sampling))
        first = prompts.tokens[:, :1]
        tokens = torch.cat([first, first, torch.ones_like(first)], 1)
        return Rollout(
            tokens=tokens,
            mask=torch.tensor([[False, True, True]]).repeat(len(tokens), 1),
            prompt_lengths=torch.ones(len(tokens), dtype=torch.long),
            finished=torch.ones(len(tokens), dtype=torch.bool),
            generation_logprobs=None,
            response_text=tuple(f"to {i}" for i in first[:, 0].tolist()),
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            source=prompts.source,
            extras=prompts.extras,
        )


def test_the_sampler_draws_as_generation_describes() -> None:
    sampler = Echo()
    responder = Responder(
        SimpleNamespace(generation=GENERATION, models={}),  # type: ignore[arg-type]
        SimpleNamespace(data_parallel=SingleReplica(), gather=lambda value: [value]),  # type: ignore[arg-type]
        SimpleNamespace(pad_id=0),  # type: ignore[arg-type]
        {},
        IDS,
        sampler,  # type: ignore[arg-type]
    )
    prompts = [TaskPrompt("one", "helpful", name, "", "", "s") for name in ("b", "a")]
    found = responder._batch("actor", "p", prompts, ResponseScores())  # type: ignore[arg-type]
    assert [(r.prompt_id, r.text, r.tokens) for r in found] == [("b", "to 7", 2), ("a", "to 5", 2)]
    assert sampler.calls == [("actor", Sampling(3, 0.5, 4, 0.7, 1.0, 6))]
    assert responder._prompts(prompts).sample_id.tolist() == [sample_id("b"), sample_id("a")]


def test_responses_of_two_samplers_are_not_mixed(tmp_path: Path) -> None:
    """The same seed gives other noise on a server; which server it is does not matter."""
    tokenizer: Any = SimpleNamespace(fingerprint="t")
    words = ("rollout=sampling", "rollout=vllm", "rollout={name: vllm, url: 'http://a:1'}")
    recipes = [compose_evaluation(["recipe=tiny/evaluate", word], RECIPES) for word in words]
    own, served, elsewhere = (origin(recipe, {}, tokenizer) for recipe in recipes)
    assert served == elsewhere
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "a.jsonl").write_text("{}")
    check_origin(tmp_path, own)
    check_origin(tmp_path, own)
    with pytest.raises(UserError, match=r"rollout\.name: sampling there, vllm now"):
        check_origin(tmp_path, served)
