"""What two ranks find out about models: every family at every layout of two against Hugging Face;
readout and heads against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.checkpoint.sharded import InlineSave
from gipo_megatron.megatron.cpu_compat import host_mode
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.heads import GroupHead, all_logits, take_hidden
from gipo_megatron.megatron.hf import export_weights, load_hf
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.outputs import (
    critic_output,
    last_token_score,
    response_positions,
    token_stats,
)
from gipo_megatron.megatron.param_sharding import EMBEDDING, placements
from gipo_megatron.megatron.roles import language_readout
from gipo_megatron.specs import HeadSpec, Optimisation, Parallel, Precision
from gipo_megatron.types import Sequences
from gipo_megatron.weights.hf_config import architecture_from_config
from tests.parity import families, tiny
from tests.parity.outputs_reference import ReadoutCase, plain_token_stats

FP32 = Precision("fp32")


def check_families(mesh: Mesh, layout: str) -> dict[str, Any]:
    """Largest difference of logits (last stage), and whether the export is bit for bit what was
    loaded."""
    cells: dict[str, Any] = {}
    ids = families.tokens()
    for name in families.FAMILIES:
        reference = families.hf_model(name)
        architecture = architecture_from_config(reference.config.to_dict(), name)
        chunks = build_chunks(architecture, mesh, FP32, initialise=False)
        state = {
            k: v
            for k, v in reference.state_dict().items()
            if not (architecture.tied_embeddings and k == "lm_head.weight")
        }
        load_hf(state, chunks, mesh, architecture)
        with torch.no_grad():
            hidden = families.run_chunks(chunks, mesh, ids)
            error = None
            if hidden is not None:
                logits = families.whole_logits(all_logits(chunks[-1], hidden), mesh)
                error = float((logits - reference(ids).logits).abs().max())
        exported = dict(export_weights(chunks, mesh, architecture))
        same = exported.keys() == state.keys() and all(
            torch.equal(exported[k], state[k]) for k in state
        )
        cells[f"{layout}/{name}/logits"], cells[f"{layout}/{name}/export"] = error, same
    return cells


def check_initialisation(mesh: Mesh, layout: str) -> dict[str, Any]:
    """A hash of the whole random model, per kind of head."""
    cells: dict[str, Any] = {}
    for name, head in (("llama", None), ("qwen3", None), ("qwen2", "value")):
        architecture = architecture_from_config(families.hf_model(name).config.to_dict(), name)
        chunks = build_chunks(architecture, mesh, FP32, head=head, seed=7)
        cells[f"{layout}/{name}/weights"] = families.digest(
            export_weights(chunks, mesh, architecture, head=head)
        )
    return cells


def check_token_stats(mesh: Mesh) -> dict[str, Any]:
    """Log-probs, entropies and gradients from a share of the vocabulary: relative distances to
    float64."""
    case = ReadoutCase.make()
    mine = slice(*(len(case.weight) // mesh.tensor_size * (mesh.tensor_rank + i) for i in (0, 1)))
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight[mine].requires_grad_()
    stats = token_stats(
        hidden,
        weight,
        case.sequences,
        response_positions(case.sequences.mask),
        vocab_size=case.vocab,
        mesh=mesh,
        temperature=0.7,
        entropy=True,
    )
    case.total(stats).backward()
    assert stats.entropy is not None and hidden.grad is not None and weight.grad is not None
    names = [f"token_stats/{name}" for name in ("logprobs", "entropy", "hidden", "weight")]
    found = stats.logprobs.detach(), stats.entropy.detach(), hidden.grad, weight.grad
    *expected, grad_weight = plain_token_stats(case, 0.7)
    return tiny.relative_errors(
        dict(zip(names, found, strict=True)),
        dict(zip(names, [*expected, grad_weight[mine]], strict=True)),
    )


def check_gradients(mesh: Mesh, layout: str) -> dict[str, Any]:
    """What llama has not (tied embeddings, QKV bias, QK-norm) through the training engine: the
    largest ‖a - b‖ / ‖b‖ of any tensor.

    After one optimizer step, the tied copies on the first and the last stage are still the same.
    """
    cells: dict[str, Any] = {}
    rows = tiny.sequences([(3, 9), (6, 2), (2, 10), (5, 5)], 1)
    for name in ("llama3_tied", "qwen2", "qwen3"):
        reference = families.hf_model(name)
        architecture = architecture_from_config(reference.config.to_dict(), name)
        log_p = (
            reference(rows.tokens)
            .logits[:, :-1]
            .log_softmax(-1)
            .gather(2, rows.tokens[:, 1:, None])
            .squeeze(2)
        )
        (-0.3 * (log_p * rows.mask[:, 1:]).sum() / rows.mask.sum()).backward()
        gradients = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
        engine = Engine(
            mesh, architecture, FP32, micro_batch=2, seed=0, optimisation=Optimisation(lr=1e-2)
        )
        load_hf(
            {k: p.detach() for k, p in reference.named_parameters()},
            engine.chunks,
            mesh,
            architecture,
        )
        engine.weights_changed()
        readout = language_readout(engine, 1.0, entropy=False)
        engine.backward([(rows, tiny.language_loss)], readout)
        cells[f"gradients/{layout}/{name}"] = max(
            tiny.relative_errors(dict(engine.gradients()), gradients).values()
        )
        engine.update([(rows, tiny.language_loss)], readout)
        if architecture.tied_embeddings and mesh.pipeline_size > 1:
            copy = next(
                p.detach().clone()
                for c in engine.chunks
                for place, p in placements(c, families.VOCAB)
                if place.name == EMBEDDING
            )
            cells[f"gradients/{layout}/{name}/tied"] = torch.equal(
                copy, mesh.broadcast_from_last_stage(copy.clone())
            )
    return cells


def hf_heads(
    sequences: Sequences, score: Tensor, head: GroupHead
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values, score and group logits of the Hugging Face trunk, and all gradients of their weighted
    sum."""
    trunk = families.hf_model("llama")
    w = score.clone().requires_grad_()
    group_w, group_b = (p.detach().clone().requires_grad_() for p in head.parameters())
    hidden = trunk.model(sequences.tokens).last_hidden_state
    raw = hidden @ w[0]
    values = torch.nn.functional.pad(raw[:, :-1], (1, 0)) * sequences.mask
    rows = torch.arange(len(sequences))
    logits = hidden[rows, sequences.prompt_lengths - 1] @ group_w.T + group_b
    out = {"values": values, "score": raw[rows, sequences.lengths - 1], "group_logits": logits}
    weighted_sum(out).backward()
    named = {
        **{k: p.grad for k, p in trunk.named_parameters() if p.grad is not None},
        "score.weight": w.grad,
    }
    return out, {**named, "group.weight": group_w.grad, "group.bias": group_b.grad}


def weighted_sum(out: dict[str, Tensor]) -> Tensor:
    g = families.generator(9)
    return torch.stack(
        [(x * torch.randn(x.shape, generator=g)).sum() for _, x in sorted(out.items())]
    ).sum()


def check_heads(mesh: Mesh, layout: str) -> dict[str, Any]:
    """Value, score and group outputs; without a pipeline also the gradient of every tensor."""
    sequences = ReadoutCase.make().sequences
    score = torch.randn(1, families.COMMON["hidden_size"], generator=families.generator(4))
    head = GroupHead(
        HeadSpec(3, "prompt", detach_trunk=False, init_std=0.5),
        families.COMMON["hidden_size"],
        mesh,
        seed=5,
    )
    expected, gradients = hf_heads(sequences, score, head)
    reference = families.hf_model("llama")
    architecture = architecture_from_config(reference.config.to_dict(), "llama")
    chunks = build_chunks(architecture, mesh, FP32, head="value", initialise=False)
    load_hf(
        {**reference.state_dict(), "score.weight": score}, chunks, mesh, architecture, head="value"
    )
    raw = families.run_chunks(chunks, mesh, sequences.tokens)
    if raw is None:
        return {f"heads/{layout}/{name}": None for name in expected}
    hidden = take_hidden(chunks[-1])
    critic = critic_output(raw, hidden, sequences, head)
    assert critic.group_logits is not None
    out = {
        "values": critic.values,
        "score": last_token_score(raw, sequences),
        "group_logits": critic.group_logits,
    }
    cells: dict[str, Any] = {
        f"heads/{layout}/{name}": float((out[name] - x).detach().abs().max())
        for name, x in expected.items()
    }
    cells[f"heads/{layout}/positions_held"] = hidden.shape[0]
    if mesh.pipeline_size == 1:
        weighted_sum(out).backward()
        for p in chunks[0].parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if getattr(p, "sequence_parallel", False):
                dist.all_reduce(grad, group=mesh.tensor_group)
            p.data.copy_(grad)  # so that the export names and joins gradients
        mine = {
            **dict(export_weights(chunks, mesh, architecture, head="value")),
            "group.weight": head.weight.grad,
            "group.bias": head.bias.grad,
        }
        assert mine.keys() == gradients.keys()
        cells[f"heads/{layout}/gradients"] = max(
            float((mine[k] - g).norm() / g.norm()) for k, g in gradients.items()
        )
    return cells


def check_group_head_steps(mesh: Mesh) -> dict[str, Any]:
    """Two replicas with different gradients: the same weights on both, those of one Adam step on
    the clipped sum."""
    head = GroupHead(HeadSpec(2, "prompt", detach_trunk=True, lr=0.1 * 8 / 128), 8, mesh, seed=3)
    plain = [p.detach().clone() for p in head.parameters()]
    adam = torch.optim.Adam(plain, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    norms = []
    for step in range(3):
        gradients = [
            [torch.randn(p.shape, generator=families.generator(10 * step + r)) for p in plain]
            for r in range(2)
        ]
        for p, g in zip(head.parameters(), gradients[mesh.data_parallel.rank], strict=True):
            p.grad = g.clone()
        norms.append(head.reduce_gradients())
        head.step(norms[-1])
        for p, a, b in zip(plain, *gradients, strict=True):
            p.grad = a + b
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        adam.step()
    error = max(
        float((p - q).detach().abs().max()) for p, q in zip(head.parameters(), plain, strict=True)
    )
    return {"group_head/steps": error, "group_head/smallest_norm": min(norms)}


def trained_group_head(mesh: Mesh) -> GroupHead:
    head = GroupHead(HeadSpec(2, "prompt", detach_trunk=True), 8, mesh, seed=3)
    for p in head.parameters():
        p.grad = torch.randn(p.shape, generator=families.generator(1))
    head.step(head.reduce_gradients())
    return head


def check_mesh(mesh: Mesh) -> dict[str, Any]:
    """Data parallel of two: sums and maxima in the tensor's own dtype."""
    group, rank = mesh.data_parallel, mesh.data_parallel.rank
    # fp32 would lose the small part
    exact = torch.tensor([2.0**-40 + rank, 2.0**40], dtype=torch.float64)
    given = exact.clone()
    total = group.sum(given)
    return {
        "mesh/sum": bool(
            torch.equal(total, torch.tensor([2.0**-39 + 1, 2.0**41], dtype=torch.float64))
        )
        and total.dtype == torch.float64,
        "mesh/input_kept": torch.equal(given, exact),
        "mesh/max": group.max(torch.tensor([rank, -rank])).tolist(),
        **check_messages(mesh),
        "mesh/place": [group.rank, group.size, mesh.tensor_rank, mesh.pipeline_rank],
    }


class Refused(UserError):
    """An error of a kind of its own, as rank 0 may raise it."""


def check_messages(mesh: Mesh) -> dict[str, Any]:
    """What rank 0 returns and raises, on every rank; objects of both replicas."""
    refused: UserError | None = None

    def refuse() -> None:
        assert mesh.is_main
        raise Refused("no such server", where="algorithm.rollout.url", fix="start it")

    try:
        mesh.from_main(refuse)
    except Refused as error:
        refused = error
    assert mesh.waiting_group is not None
    return {
        "mesh/from_main": mesh.from_main(lambda: {"rank": mesh.rank}),
        "mesh/refused": str(refused),
        "mesh/patience": mesh.waiting_group._get_backend(torch.device("cpu")).options._timeout.days,
        "mesh/gather": mesh.gather(("replica", mesh.replica)),
    }


def run(out: Path) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    stored = out / "group_head"
    stored.mkdir(exist_ok=True)
    for layout, parallel in families.LAYOUTS.items():
        mesh = Mesh.create(parallel, seed=1)
        cells |= (
            check_families(mesh, layout)
            | check_initialisation(mesh, layout)
            | check_heads(mesh, layout)
            | check_gradients(mesh, layout)
        )
        if layout == "tensor":
            cells |= check_token_stats(mesh)
            trained = trained_group_head(mesh).state_dict()
            with host_mode():
                dist_checkpointing.save(
                    trained_group_head(mesh).sharded_state(),
                    str(stored),
                    sharded_strategy=InlineSave("torch_dist", 1),
                )
        if layout == "pipeline":
            head = GroupHead(HeadSpec(2, "prompt", detach_trunk=True), 8, mesh, seed=4)
            with host_mode():
                head.load_sharded_state(dist_checkpointing.load(head.sharded_state(), str(stored)))
            loaded = head.state_dict()
            cells["group_head/reloaded"] = all(
                bool((torch.as_tensor(loaded[k]) == torch.as_tensor(trained[k])).all())
                for k in trained
            )
            cells["mesh/broadcast"] = mesh.broadcast_from_last_stage(
                torch.tensor([mesh.pipeline_rank])
            ).tolist()
    mesh = Mesh.create(Parallel(), seed=1)
    return cells | check_mesh(mesh) | check_group_head_steps(mesh)
