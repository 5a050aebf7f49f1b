from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.heads import (
    GroupHead,
    LanguageHead,
    ScalarHead,
    all_logits,
    output_weight,
    take_hidden,
)
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.roles import language_readout
from gipo_megatron.specs import HeadSpec, Optimisation, Precision
from gipo_megatron.types import Loss, Sequences, TokenStats
from tests.parity.families import LAYOUTS
from tests.parity.tiny import ARCHITECTURE, language_loss, sequences

SPEC = HeadSpec(num_groups=2, input="prompt", detach_trunk=True)


def loss(mesh: Mesh, group: GroupHead | None, rows: Sequences) -> list[torch.nn.Parameter]:
    """One backward pass of a value loss, with or without a group loss beside it; returns the
    model's parameters."""
    chunks = build_chunks(ARCHITECTURE, mesh, Precision("fp32"), head="value", seed=3)
    raw = chunks[0](rows.tokens, None, None)
    total = raw.square().mean()
    hidden = take_hidden(chunks[0])
    if group is not None:
        total = total + group.logits(hidden, rows).softmax(1)[:, 0].sum()
    total.backward()
    return list(chunks[0].parameters())


def test_an_observing_head_changes_nothing_else_bit_for_bit(mesh: Mesh) -> None:
    rows = sequences([(2, 4), (3, 2)], 1)
    without, observed = (
        loss(mesh, None, rows),
        loss(mesh, GroupHead(SPEC, ARCHITECTURE.hidden_size, mesh, 0), rows),
    )
    pairs = [(p.grad, q.grad) for p, q in zip(without, observed, strict=True)]
    assert (
        all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
        and len(pairs) > 20
    )


def test_a_learning_head_reaches_the_trunk(mesh: Mesh) -> None:
    rows = sequences([(2, 4), (3, 2)], 1)
    head = GroupHead(
        HeadSpec(2, "prompt", detach_trunk=False, init_std=1.0), ARCHITECTURE.hidden_size, mesh, 0
    )
    without, learning = loss(mesh, None, rows), loss(mesh, head, rows)
    moved = [not torch.equal(p.grad, q.grad) for p, q in zip(without, learning, strict=True)]
    assert sum(moved) > 20  # the value head's own weight is not among them
    assert head.weight.grad is not None and head.weight.grad.any()


def test_initial_weights_are_normal_from_their_own_seed(mesh: Mesh) -> None:
    """Standard deviation 0.02 on a trunk of width 128, so 0.02 sqrt(128 / 20000) here."""
    head = GroupHead(HeadSpec(2, "prompt", True, init_std=0.02), 20000, mesh, seed=1)
    assert head.weight.dtype == torch.float32
    assert abs(float(head.weight.detach().std()) - 0.0016) < 4e-5 and not head.bias.any()
    same, other = (
        GroupHead(head.spec, 20000, mesh, seed=1),
        GroupHead(head.spec, 20000, mesh, seed=2),
    )
    assert torch.equal(head.weight, same.weight) and not torch.equal(head.weight, other.weight)


def test_an_unknown_input_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="prompt or trajectory"):
        GroupHead(HeadSpec(2, "response", True), 4, mesh, seed=0)


def test_state_comes_back_with_the_optimizer(mesh: Mesh) -> None:
    def one_step(head: GroupHead, seed: int) -> None:
        for p in head.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        head.step(head.reduce_gradients())

    first, second = GroupHead(SPEC, 8, mesh, 0), GroupHead(SPEC, 8, mesh, 1)
    assert first.state_dict()["step"] == 0
    one_step(first, 5)
    second.load_state_dict(first.state_dict())
    for head in (first, second):
        one_step(head, 6)
    assert first.state_dict()["step"] == second.state_dict()["step"] == 2
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_the_norm_is_reported_and_clipped_to_one(mesh: Mesh) -> None:
    """SGD-like check through Adam's first moment: m = 0.1 · clipped gradient."""
    head = GroupHead(SPEC, 2, mesh, 0)
    head.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    head.bias.grad = torch.tensor([0.0, 4.0])
    norm = head.reduce_gradients()
    assert norm == pytest.approx(5.0)
    head.step(norm)
    torch.testing.assert_close(
        head.state_dict()["weight.exp_avg"], torch.tensor([[0.06, 0.0], [0.0, 0.0]])
    )
    torch.testing.assert_close(head.state_dict()["bias.exp_avg"], torch.tensor([0.0, 0.08]))
    assert head.weight.grad is None


def test_scalar_head_is_fp32_in_a_bf16_model(mesh: Mesh) -> None:
    chunks = build_chunks(ARCHITECTURE, mesh, Precision("bf16"), head="score")
    head = chunks[0].output_layer
    assert isinstance(head, ScalarHead) and head.weight.dtype == torch.bfloat16
    out = chunks[0](torch.arange(6).view(1, 6), None, None)
    assert out.shape == (1, 6, 1) and out.dtype == torch.float32
    hidden = take_hidden(chunks[0])
    torch.testing.assert_close(out[0, :, 0], hidden[:, 0].float() @ head.weight[0].float())
    with pytest.raises(AssertionError, match="no forward pass"):
        take_hidden(chunks[0])


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_hands_on_hidden_states(mesh: Mesh, tied: bool) -> None:
    """The model's input to mcore's own layer, whose weight and names are as before."""
    architecture = replace(ARCHITECTURE, tied_embeddings=tied)
    (chunk,) = build_chunks(architecture, mesh, Precision("fp32"))
    layer, seen = chunk.output_layer, []
    layer.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    hidden = chunk(torch.arange(12).view(2, 6), None, None)
    assert isinstance(layer, LanguageHead) and hidden.shape == (2, 6, ARCHITECTURE.hidden_size)
    assert torch.equal(hidden, seen[0].transpose(0, 1))
    weight = output_weight(chunk)
    assert weight is (chunk.embedding.word_embeddings.weight if tied else layer.weight)
    theirs, _ = ColumnParallelLinear.forward(layer, seen[0], weight=weight)
    torch.testing.assert_close(all_logits(chunk, hidden), theirs.transpose(0, 1))
    assert ("output_layer.weight" in dict(chunk.named_parameters())) is not tied


def without_gradient(output: TokenStats, rows: Sequences) -> Loss:
    return Loss({"x": (output.logprobs.detach().sum(), "token")})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_micro_batch_reaches_the_heads_weight(mesh: Mesh, tied: bool, masked: bool) -> None:
    """With several replicas mcore's DDP waits for a gradient of each parameter: also where nothing
    is masked, or where the loss has no gradient."""
    architecture = replace(ARCHITECTURE, tied_embeddings=tied)
    engine = Engine(
        mesh,
        architecture,
        Precision("fp32"),
        micro_batch=1,
        seed=0,
        optimisation=Optimisation(lr=1e-3),
    )
    rows = sequences([(2, 4), (3, 2)], 1)
    rows = replace(rows, mask=rows.mask & masked)
    seen: list[Tensor] = []
    output_weight(engine.chunks[-1]).register_hook(seen.append)
    loss = without_gradient if masked else language_loss
    _, bad = engine.backward([(rows, loss)], language_readout(engine, 1.0, entropy=True))
    assert bad == [] and len(seen) == 2
    assert all(g.shape == (256, 32) and not g.any() for g in seen)


@pytest.mark.multiprocess
def test_heads_at_every_layout_of_two(model_cells: list[dict[str, Any]]) -> None:
    """Values, scores, group logits within 1e-5 of Hugging Face's trunk with plain heads; gradients
    per tensor within 1e-5."""
    checked = 0
    for layout in LAYOUTS:
        for name in (
            "values",
            "score",
            "group_logits",
            *(["gradients"] if layout.startswith("tensor") else []),
        ):
            found = [cells[f"heads/{layout}/{name}"] for cells in model_cells]
            found = [x for x in found if x is not None]
            assert found and max(found) < 1e-5, (layout, name, found)
            checked += 1
    assert checked == 14
    assert {cells["heads/tensor_sequence/positions_held"] for cells in model_cells} == {6}, (
        "sequence parallel was not on"
    )
    assert {cells["heads/tensor/positions_held"] for cells in model_cells} == {12}


@pytest.mark.multiprocess
def test_two_replicas_take_the_step_of_the_clipped_sum(model_cells: list[dict[str, Any]]) -> None:
    for cells in model_cells:
        assert cells["group_head/steps"] < 1e-6
        assert cells["group_head/smallest_norm"] > 1, "nothing was clipped"
    assert len(model_cells) == 2


@pytest.mark.multiprocess
def test_a_group_head_saved_under_tensor_parallel_loads_under_pipeline_parallel(
    model_cells: list[dict[str, Any]],
) -> None:
    assert model_cells[1]["group_head/reloaded"] is True  # rank 1 is the last stage
