"""On the device what the CPU tests say of the host: log-probs and greedy tokens are Hugging Face's, collectives are NCCL's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Precision, Sampling
from gipo_megatron.types import Prompts
from tests.parity.roles import new_actor
from tests.parity.tiny import hf_model, hf_token_stats, weighted


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_logprobs_and_entropies(mesh: Mesh, dtype: str, tolerance: float) -> None:
    """fp32: where TF32 is off, as it is by default, only the order of sums differs. bf16: both round, each in its own places."""
    rows = weighted().inner
    expected = hf_token_stats(hf_model(), rows)
    stats = new_actor(mesh, precision=Precision(dtype), optimisation=None).logprobs(rows, entropy=True)
    assert stats.logprobs.device.type == "cuda" and stats.entropy is not None and expected.entropy is not None
    for mine, theirs in ((stats.logprobs, expected.logprobs), (stats.entropy, expected.entropy)):
        gap = (mine.cpu() - theirs).abs()[rows.mask]
        assert len(gap) == int(rows.mask.sum()) and float(gap.mean() if dtype == "bf16" else gap.max()) < tolerance


def test_greedy_tokens(mesh: Mesh) -> None:
    """Ragged prompts, fp32: each row is what Hugging Face says of it alone, on the CPU."""
    lengths, steps = (7, 3, 9, 1), 24
    width, generator = max(lengths), torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 250, (len(lengths), width), generator=generator)
    ids = torch.arange(len(lengths))
    tokens = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], tokens, 0)
    prompts = Prompts(tokens, torch.tensor(lengths), ids, ids, ("",) * 4, ({},) * 4)
    rollout = new_actor(mesh, optimisation=None).generate(prompts, Sampling(steps, temperature=0.0))
    reference = hf_model()
    for row, length in enumerate(lengths):
        text = tokens[row, :length].tolist()
        with torch.no_grad():
            for _ in range(int(rollout.response_lengths[row])):
                text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
        assert rollout.tokens[row, : len(text)].tolist() == text


def test_sampling_is_repeatable_and_its_logprobs_are_the_training_forwards(mesh: Mesh) -> None:
    actor = new_actor(mesh, optimisation=None)
    ids = torch.arange(8)
    prompts = Prompts(torch.full((8, 4), 5), torch.full((8,), 4), ids, ids, ("",) * 8, ({},) * 8)
    first, second = (actor.generate(prompts, Sampling(16, seed=3)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens) and len({tuple(row) for row in first.tokens.tolist()}) > 1
    assert first.generation_logprobs is not None
    gap = (actor.logprobs(first.sequences).logprobs - first.generation_logprobs).abs()[first.mask]
    assert float(gap.max()) < 1e-3


def test_nccl(mesh: Mesh) -> None:
    backend = dist.group.WORLD._get_backend(torch.device("cuda"))
    assert "nccl" in type(backend).__name__.lower()
    x = torch.arange(4.0, device=mesh.device)
    dist.all_reduce(x, group=mesh.data_parallel.group)
    assert x.tolist() == [0, 1, 2, 3]
