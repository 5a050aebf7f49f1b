"""What the roles answer, against Hugging Face's model with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.build import snapshot_of
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts
from gipo_megatron.weights.hf_config import config_for
from tests.parity.roles import new_actor, new_critic, new_reward
from tests.parity.tiny import (
    ARCHITECTURE,
    GROUP,
    hf_critic,
    hf_hidden,
    hf_model,
    hf_token_stats,
    pairs,
    score_weight,
    weighted,
)

pytestmark = pytest.mark.global_rng


def test_logprobs_and_entropy(mesh: Mesh) -> None:
    rows = weighted()
    stats, expected = (
        new_actor(mesh, micro_batch=3).logprobs(rows, entropy=True),
        hf_token_stats(hf_model(), rows.inner),
    )
    assert stats.entropy is not None and expected.entropy is not None
    torch.testing.assert_close(stats.logprobs, expected.logprobs.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, expected.entropy.detach(), atol=1e-5, rtol=1e-5)
    assert new_actor(mesh).logprobs(rows).entropy is None


def test_prompt_tokens_cost_no_products_in_the_head(mesh: Mesh) -> None:
    """Of two batches that differ in the mask alone: 2 · H · V operations a masked token."""
    rows, counts = weighted().inner, []
    last = torch.arange(rows.tokens.shape[1]) == rows.lengths[:, None] - 1
    actor = new_actor(mesh)
    for mask in (rows.mask, rows.mask & last):
        with FlopCounterMode(display=False) as counted:
            actor.logprobs(replace(rows, mask=mask))
        counts.append(counted.get_total_flops())
    fewer = int((rows.mask & ~last).sum())
    assert fewer > 20
    assert counts[0] - counts[1] == 2 * fewer * ARCHITECTURE.hidden_size * ARCHITECTURE.vocab_size


def test_values_and_group_logits(mesh: Mesh) -> None:
    rows = weighted()
    critic = new_critic(mesh, group=GROUP)
    head = critic.engine.group_head
    assert head is not None
    found = critic.evaluate(rows)
    expected = hf_critic(
        hf_hidden(hf_model(), rows.inner), score_weight(), (head.weight, head.bias), rows.inner
    )
    assert found.group_logits is not None and expected.group_logits is not None
    torch.testing.assert_close(found.values, expected.values.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.group_logits, expected.group_logits.detach(), atol=1e-5, rtol=1e-5
    )
    assert new_critic(mesh, group=None).evaluate(rows).group_logits is None


def test_scores_of_pairs(mesh: Mesh) -> None:
    rows = pairs().sequences
    hidden = hf_hidden(hf_model(), rows)[torch.arange(8), rows.lengths - 1]
    found = new_reward(mesh).score(pairs())
    torch.testing.assert_close(found, (hidden @ score_weight()[0]).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["prompt", "trajectory"])
def test_features_of_the_reward_model(position: str, mesh: Mesh) -> None:
    rows = weighted().inner
    last = (rows.prompt_lengths if position == "prompt" else rows.lengths) - 1
    expected = hf_hidden(hf_model(), rows)[torch.arange(len(last)), last]
    found = new_reward(mesh, micro_batch=3).features(rows, position)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


def test_export_is_what_was_loaded(mesh: Mesh) -> None:
    exported, theirs = dict(new_actor(mesh).export_weights()), dict(hf_model().named_parameters())
    assert exported.keys() == theirs.keys() and len(exported) == 39
    assert all(torch.equal(exported[name], theirs[name]) for name in exported)


def test_greedy_generation(mesh: Mesh) -> None:
    ids = torch.arange(2)
    prompts = Prompts(
        torch.tensor([[5, 6, 7], [9, 8, 0]]), torch.tensor([3, 2]), ids, ids, ("a", "b"), ({}, {})
    )
    rollout = new_actor(mesh).generate(prompts, Sampling(max_response=4, temperature=0.0))
    with torch.no_grad():
        for row, length in enumerate((3, 2)):
            text = prompts.tokens[row, :length].tolist()
            for _ in range(int(rollout.response_lengths[row])):
                text.append(int(hf_model()(torch.tensor([text])).logits[0, -1].argmax()))
            assert rollout.tokens[row, : len(text)].tolist() == text


def test_a_swapped_reference_must_fit(mesh: Mesh, tmp_path: Path) -> None:
    other = replace(ARCHITECTURE, rope_base=5e5)
    (tmp_path / "config.json").write_text(json.dumps(config_for(other, "float32")))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="another architecture: rope_base: there 500000"):
        snapshot_of(new_actor(mesh).engine, str(tmp_path), "reference")
