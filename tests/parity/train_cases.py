"""What ranks find out about training at one layout: gradients, first steps, skipped steps,
residency, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint, optimizer
from gipo_megatron.megatron.build import snapshot_of
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
)
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.types import Loss, TokenStats
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tests.parity.roles import (
    digest,
    digest_of,
    engine,
    fill,
    mine,
    new_actor,
    new_critic,
    new_reward,
    parts_of,
)
from tests.parity.te import fake_fp8, numbered, story
from tests.parity.tiny import GROUP, Weighted, hf_gradients, ppo_loss, relative_errors, weighted

BF16 = Precision("bf16")


# ---------------------------------------------------------------------------------------- gradients

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("reward", {}),
    "selective": ("text", {"recompute": "selective"}),
    "full": ("text", {"recompute": "full"}),
    "bf16": ("text", {"precision": BF16}),
    "bf16_full": ("text", {"precision": BF16, "recompute": "full"}),
    "bf16_pairs": ("reward", {"precision": BF16}),
}
_plain_gradients = cache(hf_gradients)


def gradient_cell(mesh: Mesh, variant: str, micro_batch: int) -> dict[str, float]:
    """Relative error per tensor against fp32 autograd: of the reward model's pairs, or of the
    policy's log-likelihood."""
    kind, changes = VARIANTS[variant]
    role = new_reward(mesh, **changes) if kind == "reward" else new_actor(mesh, **changes)
    role.engine.micro_batch = micro_batch
    _, bad = role.engine.backward(parts_of(kind, mesh), role.readout)
    assert bad == []
    return relative_errors(
        {name: g.float() for name, g in role.engine.gradients()}, _plain_gradients(kind)
    )


# kind -> tokens of a micro-batch; the longest row has 19 tokens, the longest pair 2 × 19
BUDGETS = {"actor": 20, "reward": 40}


def budget(mesh: Mesh) -> dict[str, Any]:
    """Relative error per tensor of the gradients with a token budget against those with two rows a
    micro-batch, and the numbers of micro-batches: planned here, and of the update."""
    found: dict[str, Any] = {}
    for kind, tokens in BUDGETS.items():
        role = new_actor(mesh) if kind == "actor" else new_reward(mesh)
        engine, parts, gradients = role.engine, parts_of(kind, mesh), []
        for engine.micro_batch, engine.micro_tokens in ((2, None), (None, tokens)):
            engine.backward(parts, role.readout)
            gradients.append(dict(engine.gradients()))
        found[kind] = {
            "errors": relative_errors(gradients[1], gradients[0]),
            "planned": sum(len(engine._plan(rows)) for rows, _ in parts),
            "made": len(engine._slots(parts)),
        }
    return found


# -------------------------------------------------------------------------------- one step, or none


def first_steps(mesh: Mesh) -> dict[str, list[float]]:
    """Metrics of two updates: whatever the layout, the same numbers to rounding."""
    actor, critic = new_actor(mesh), new_critic(mesh)
    seen: dict[str, list[float]] = {}
    for step in range(2):
        for role, kind in ((actor, "actor"), (critic, "critic")):
            update = role.update(*parts_of(kind, mesh))
            assert update.skipped is None
            seen[f"{kind}/{step}"] = [
                update.metrics["grad_norm"].result(),
                update.metrics["learning_rate"].result(),
            ]
    stats = actor.logprobs(mine(mesh, weighted()), entropy=True)
    assert stats.entropy is not None
    total = mesh.data_parallel.sum(
        torch.stack([stats.logprobs.sum(), stats.entropy.sum()]).double()
    )
    seen["logprobs"] = total.tolist()
    return seen


def poisoned(where: int) -> Callable[[TokenStats, Weighted], Loss]:
    """A loss that is NaN in the micro-batches that hold row `where`."""

    def loss(output: TokenStats, rows: Weighted) -> Loss:
        bad = (rows.inner.ids == where).any()
        total = (output.logprobs * rows.inner.mask).sum()
        return Loss({"policy": (torch.where(bad, total * torch.nan, total), "token")})

    return loss


def steep(output: TokenStats, rows: Weighted) -> Loss:
    """A finite loss (0) with an infinite gradient."""
    zero = output.logprobs - output.logprobs.detach()
    return Loss({"policy": ((zero.sum() * 1e38 * 1e38).sum(), "token")})


def skipping(mesh: Mesh) -> dict[str, Any]:
    """What is skipped, and that nothing moved: weights, moments (by the next step's result),
    learning rate."""
    actor, untouched = new_actor(mesh, micro_batch=1), new_actor(mesh, micro_batch=1)
    rows = mine(mesh, weighted())
    before = digest(actor)
    named = actor.update((rows, poisoned(3))).skipped
    every = actor.update((rows, steep)).skipped
    unmoved = digest(actor) == before
    actor.update((rows, ppo_loss))
    untouched.update((rows, ppo_loss))
    return {
        "named": named,
        "every": every,
        "unmoved": unmoved,
        "same_next": digest(actor) == digest(untouched),
    }


def observing(mesh: Mesh) -> bool:
    """A group head on a detached trunk changes neither value nor trunk, bit for bit, while it
    learns itself."""
    watched, plain = (
        new_critic(mesh, group=replace(GROUP, detach_trunk=True)),
        new_critic(mesh, group=None),
    )
    assert watched.engine.group_head is not None
    start = watched.engine.group_head.weight.detach().clone()
    for _ in range(2):
        watched.update(*parts_of("critic", mesh))
        plain.update(*parts_of("critic", mesh))
    moved = not torch.equal(start, watched.engine.group_head.weight) or not mesh.is_last_stage
    ours, theirs = dict(watched.engine.export()), dict(plain.engine.export())
    return (
        moved
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def overlapping(mesh: Mesh) -> dict[str, Any]:
    """Gradients of the same weights, summed over the replicas in many buckets: after the first
    backward pass, during the second.

    mcore learns in the first which gradients complete a bucket. `whole`: in one bucket, after the
    pass.
    """
    found: dict[str, Any] = {}
    for name, changes in (
        ("buckets", {"bucket_size": 3000}),
        ("whole", {"overlap_grad_reduce": False}),
    ):
        with patch.object(
            optimizer,
            "DistributedDataParallelConfig",
            _altered(optimizer.DistributedDataParallelConfig, changes),
        ):
            roles = {
                "actor": new_actor(mesh, micro_batch=1),
                "critic": new_critic(mesh, micro_batch=1),
            }
        for kind, role in roles.items():
            wrapped, seen = role.engine._wrapped, []
            for _ in range(2):
                role.engine.backward(parts_of(kind, mesh), role.readout)
                seen.append(digest_of(role.engine.gradients()))
            found[f"{kind}/{name}"] = {
                "gradients": seen,
                "overlaps": all(w.ddp_config.overlap_grad_reduce for w in wrapped),
                "buckets": sum(len(buffer.buckets) for w in wrapped for buffer in w.buffers),
            }
    return found


def _altered(make: Callable[..., Any], changes: dict[str, Any]) -> Callable[..., Any]:
    return lambda **arguments: make(**{**arguments, **changes})


# ---------------------------------------------------------------------------------------- residency


def parked_bytes(role: Any) -> int:
    tensors = [
        *role.engine._weights(),
        *role.engine._gradients(),
        *role.engine.optimizer_tensors(),
    ]
    return sum(t.untyped_storage().size() for t in tensors)


def residency(mesh: Mesh) -> dict[str, Any]:
    """The same training with and without offload, and with a reference swapped in and out, gives
    the same bits."""
    plain = [new_actor(mesh), new_critic(mesh)]
    moving = [
        MegatronActor(engine("actor", mesh, offload="cpu"), eos_id=1, pad_id=0, decode=str),
        MegatronCritic(engine("critic", mesh, offload="cpu", group=GROUP)),
    ]
    for role in moving:
        with role.engine.residency.use(training=True):
            fill(role)
    rows = mine(mesh, weighted())
    own_reference = MegatronReference(engine("reference", mesh, seed=9, optimisation=None))
    live = moving[0].engine
    swapped = MegatronReference(live, state=snapshot_of(live, "random", "reference", seed=9))
    away = []
    references: list[Tensor] = []
    for _ in range(2):
        for models in (plain, moving):
            models[0].logprobs(rows)
            models[0].update(*parts_of("actor", mesh))
            models[1].update(*parts_of("critic", mesh))
        away.append(parked_bytes(moving[0]))  # the critic was used last
        references += [own_reference.logprobs(rows).logprobs, swapped.logprobs(rows).logprobs]
    return {
        "same": [digest(a) == digest(b) for a, b in zip(plain, moving, strict=True)],
        "parked_bytes": away,
        "reference_same": [
            torch.equal(a, b) for a, b in zip(references[::2], references[1::2], strict=True)
        ],
        "reference_differs_from_actor": not torch.equal(
            references[0], plain[0].logprobs(rows).logprobs
        ),
    }


# -------------------------------------------------------------------------------------- checkpoints


def train(roles: dict[str, Any], mesh: Mesh, steps: int) -> list[float]:
    norms = []
    for _ in range(steps):
        norms += [
            role.update(*parts_of(kind, mesh)).metrics["grad_norm"].result()
            for kind, role in roles.items()
        ]
    return norms


def both(mesh: Mesh, **changes: Any) -> dict[str, Any]:
    return {"actor": new_actor(mesh, **changes), "critic": new_critic(mesh, **changes)}


def interrupted(mesh: Mesh, out: Path, **changes: Any) -> dict[str, Any]:
    """Three steps, a checkpoint in OUT/step_3, two more: what a run that goes on from it must do,
    too."""
    roles = both(mesh, **changes)
    train(roles, mesh, 3)
    state = {"position": 3, "generator": torch.Generator().manual_seed(1).get_state()}
    engines = {k: r.engine for k, r in roles.items()}
    checkpoint.save(out, engines, mesh, CheckpointMeta(3, tokenizer="bytes"), state)
    return {"norms": train(roles, mesh, 2), "digests": [digest(r) for r in roles.values()]}


def resumed(mesh: Mesh, out: Path, **changes: Any) -> dict[str, Any]:
    """Two steps from the checkpoint, whatever layout it was written at."""
    roles = both(mesh, **changes)
    engines = {k: r.engine for k, r in roles.items()}
    state = checkpoint.restore(out / "step_3", engines, mesh)
    assert state["position"] == 3
    rates = [e.learning_rate.steps for e in engines.values()]
    return {
        "norms": train(roles, mesh, 2),
        "digests": [digest(r) for r in roles.values()],
        "steps": rates,
    }


def damaged(mesh: Mesh, out: Path) -> str:
    """The error of this rank where one bit of what rank 1 wrote has changed."""
    path = out / "step_3"
    if mesh.is_main:
        file = path / "actor" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        shutil.copytree(path, out / "damaged")
        (out / "damaged" / "actor" / file.name).write_bytes(content)
    mesh.barrier()
    try:
        checkpoint.restore(out / "damaged", {"actor": new_actor(mesh).engine}, mesh)
    except UserError as error:
        return error.what
    return "restored"


def scaling(out: Path, layouts: dict[str, Parallel]) -> dict[str, dict[int, Any]]:
    """FP8 scaling state, saved at the first layout: what each one has from it, by the layer's
    number in the whole model."""
    found: dict[str, dict[int, Any]] = {}
    for name, parallel in layouts.items():
        mesh = Mesh.create(parallel)
        engine = new_actor(mesh).engine
        fakes = fake_fp8(engine)
        layers = [
            layer.layer_number - 1 for chunk in engine.chunks for layer in chunk.decoder.layers
        ]
        if not found:
            engine.scaling.write(
                {f"0.decoder.layers.{i}.fake": numbered(layer) for i, layer in enumerate(layers)}
            )
            checkpoint.save(out, {"actor": engine}, mesh, CheckpointMeta(1))
            engine.scaling.write({})
        checkpoint.restore(out / "step_1", {"actor": engine}, mesh)
        found[name] = {layer: story(fake) for layer, fake in zip(layers, fakes, strict=True)}
    return found
