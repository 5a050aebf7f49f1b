"""Run under torchrun: gradients of actor, critic, group head and reward model at every layout of this world, and what else needs ranks.

train_worker.py OUT_DIR [checkpoints]      writes OUT_DIR/rank_R.json (and OUT_DIR/checkpoints/step_3)
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic, MegatronReference, MegatronRewardModel
from gipo_megatron.specs import Optimisation, Parallel, Precision
from gipo_megatron.types import Loss, Rows, TokenStats
from tests.parity.launch import write_result
from tests.parity.tiny import (
    ARCHITECTURE,
    GROUP,
    Weighted,
    critic_loss,
    hf_gradients,
    hf_model,
    language_loss,
    pair_loss,
    pairs,
    ppo_loss,
    pretraining,
    relative_errors,
    score_weight,
    weighted,
)

LAYOUTS = {
    1: {"single": Parallel()},
    2: {
        "tp2": Parallel(tensor=2),
        "tp2_sp": Parallel(tensor=2, sequence=True),
        "pp2": Parallel(pipeline=2),
        "pp2_vpp2": Parallel(pipeline=2, virtual_pipeline=2),
        "dp2": Parallel(),
    },
    4: {"tp2_pp2_sp": Parallel(tensor=2, pipeline=2, sequence=True), "pp2_dp2": Parallel(pipeline=2), "tp2_dp2": Parallel(tensor=2)},
}
MICRO_BATCHES = (1, 2, 4)
ADAM = Optimisation(lr=1e-3, warmup_steps=2)


def mine(mesh: Mesh, rows: Rows) -> Rows:
    """Global row i is row i // D of replica i % D."""
    data = mesh.data_parallel
    return rows.select(torch.arange(data.rank, len(rows), data.size))


def common(mesh: Mesh, **changes: Any) -> dict[str, Any]:
    base = {"mesh": mesh, "architecture": ARCHITECTURE, "precision": Precision("fp32"), "micro_batch": 2, "seed": 0, "load": "random"}
    return {**base, "optimisation": ADAM, **changes}


def fill(role: Any) -> Any:
    """The Hugging Face weights in a role's model."""
    weights = {name: p.detach() for name, p in hf_model().named_parameters()}
    if role.engine.head is not None:
        weights["score.weight"] = score_weight()
    load_hf(weights, role.engine.chunks, role.engine.mesh, ARCHITECTURE, head=role.engine.head)
    role.engine.weights_changed()
    return role


def new_actor(mesh: Mesh, **changes: Any) -> MegatronActor:
    return fill(MegatronActor(**common(mesh, **changes), eos_id=1, pad_id=0, decode=str))


def new_critic(mesh: Mesh, **changes: Any) -> MegatronCritic:
    return fill(MegatronCritic(**common(mesh, **{"head": GROUP, **changes})))


def parts_of(kind: str, mesh: Mesh) -> list[tuple[Rows, Callable[..., Loss]]]:
    if kind == "actor":
        return [(mine(mesh, weighted()), ppo_loss), (mine(mesh, pretraining()), language_loss)]
    return [(mine(mesh, weighted()), critic_loss)] if kind == "critic" else [(mine(mesh, pairs()), pair_loss)]


def digest(role: Any) -> str:
    state = hashlib.sha256()
    for name, tensor in role.engine.export():
        state.update(name.encode() + tensor.contiguous().numpy().tobytes())
    if role.engine.group_head is not None and role.engine.mesh.is_last_stage:
        state.update(role.engine.group_head.weight.detach().numpy().tobytes())
    return state.hexdigest()


# ------------------------------------------------------------------------------------------------- gradients


def gradient_cells(mesh: Mesh, name: str) -> dict[str, dict[str, float]]:
    """{layout/kind/micro-batch: {tensor: relative error}}; the group head's on the last stage only."""
    cells = {}
    roles = {"actor": new_actor(mesh), "critic": new_critic(mesh), "reward": fill(MegatronRewardModel(**common(mesh)))}
    for kind, role in roles.items():
        head = role.engine.group_head
        expected = hf_gradients(kind, (head.weight.detach(), head.bias.detach()) if head is not None else None)
        for micro_batch in MICRO_BATCHES:
            role.engine.micro_batch = micro_batch
            metrics, bad = role.engine.backward(parts_of(kind, mesh), role.readout)
            assert bad == [] and (kind != "actor" or metrics["rows"].result() == len(mine(mesh, weighted())))
            found = dict(role.engine.gradients())
            wanted = dict(expected)
            if head is not None:
                norm = head.reduce_gradients()
                if mesh.is_last_stage:
                    found |= {"group.weight": head.weight.grad, "group.bias": head.bias.grad}
                    assert math.isclose(norm, float(torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm()), rel_tol=1e-6)
                else:
                    wanted = {k: v for k, v in wanted.items() if not k.startswith("group.")}
            cells[f"{name}/{kind}/{micro_batch}"] = relative_errors(found, wanted)
    return cells


# ------------------------------------------------------------------------------------------------- one step, or none


def first_steps(mesh: Mesh) -> dict[str, list[float]]:
    """Metrics of two updates: whatever the layout, the same numbers to rounding."""
    actor, critic = new_actor(mesh), new_critic(mesh)
    seen: dict[str, list[float]] = {}
    for step in range(2):
        for role, kind in ((actor, "actor"), (critic, "critic")):
            update = role.update(*parts_of(kind, mesh))
            assert update.skipped is None
            seen[f"{kind}/{step}"] = [update.metrics["grad_norm"].result(), update.metrics["learning_rate"].result()]
    stats = actor.logprobs(mine(mesh, weighted()), entropy=True)
    assert stats.entropy is not None
    total = mesh.data_parallel.sum(torch.stack([stats.logprobs.sum(), stats.entropy.sum()]).double())
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
    """What is skipped, and that nothing moved: weights, moments (by the next step's result), learning rate."""
    actor, untouched = new_actor(mesh, micro_batch=1), new_actor(mesh, micro_batch=1)
    rows = mine(mesh, weighted())
    before = digest(actor)
    named = actor.update((rows, poisoned(3))).skipped
    every = actor.update((rows, steep)).skipped
    unmoved = digest(actor) == before
    actor.update((rows, ppo_loss))
    untouched.update((rows, ppo_loss))
    return {"named": named, "every": every, "unmoved": unmoved, "same_next": digest(actor) == digest(untouched)}


def observing(mesh: Mesh) -> bool:
    """A group head on a detached trunk changes neither value nor trunk, bit for bit, while it learns itself."""
    watched, plain = new_critic(mesh, head=replace(GROUP, detach_trunk=True)), new_critic(mesh, head=None)
    assert watched.engine.group_head is not None
    start = watched.engine.group_head.weight.detach().clone()
    for _ in range(2):
        watched.update(*parts_of("critic", mesh))
        plain.update(*parts_of("critic", mesh))
    moved = not torch.equal(start, watched.engine.group_head.weight) or not mesh.is_last_stage
    ours, theirs = dict(watched.engine.export()), dict(plain.engine.export())
    return moved and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------- residency


def parked_bytes(role: Any) -> int:
    tensors = [*role.engine._weights(), *role.engine._gradients(), *role.engine._optimizer_tensors()]
    return sum(t.untyped_storage().size() for t in tensors)


def residency(mesh: Mesh) -> dict[str, Any]:
    """The same training with and without offload, and with a reference swapped in and out, gives the same bits."""
    plain = [new_actor(mesh), new_critic(mesh)]
    moving = [
        MegatronActor(**common(mesh, offload="cpu"), eos_id=1, pad_id=0, decode=str),
        MegatronCritic(**common(mesh, offload="cpu", head=GROUP)),
    ]
    for role in moving:
        with role.engine.residency.use(training=True):
            fill(role)
    rows = mine(mesh, weighted())
    own_reference = MegatronReference(**{k: v for k, v in common(mesh, seed=9).items() if k != "optimisation"})
    swapped = MegatronReference(**{k: v for k, v in common(mesh, seed=9, offload="cpu").items() if k != "optimisation"}, live=moving[0])
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
        "reference_same": [torch.equal(a, b) for a, b in zip(references[::2], references[1::2], strict=True)],
        "reference_differs_from_actor": not torch.equal(references[0], plain[0].logprobs(rows).logprobs),
    }


# ------------------------------------------------------------------------------------------------- checkpoints


def train(roles: dict[str, Any], mesh: Mesh, steps: int) -> list[float]:
    norms = []
    for _ in range(steps):
        norms += [role.update(*parts_of(kind, mesh)).metrics["grad_norm"].result() for kind, role in roles.items()]
    return norms


def checkpoints(out: Path, world: int) -> dict[str, Any]:
    """Save at the first layout after 3 steps, go on for 2; the same from the checkpoint, at every layout."""
    result: dict[str, Any] = {}
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        roles = {"actor": new_actor(mesh), "critic": new_critic(mesh)}
        engines = {k: r.engine for k, r in roles.items()}
        if not result:
            train(roles, mesh, 3)
            state = {"position": 3, "generator": torch.Generator().manual_seed(1).get_state()}
            checkpoint.save(out / "checkpoints", 3, engines, mesh, state, {"tokenizer": "bytes"})
            result["uninterrupted"] = {"norms": train(roles, mesh, 2), "digests": [digest(r) for r in roles.values()]}
            roles = {"actor": new_actor(mesh), "critic": new_critic(mesh)}
            engines = {k: r.engine for k, r in roles.items()}
        state = checkpoint.restore(out / "checkpoints" / "step_3", engines, mesh)
        assert state["position"] == 3
        rates = [e.learning_rate.steps for e in engines.values()]
        result[name] = {"norms": train(roles, mesh, 2), "digests": [digest(r) for r in roles.values()], "steps": rates}
    return result


def everything(world: int) -> dict[str, Any]:
    result: dict[str, Any] = {"cells": {}, "steps": {}, "skipping": {}, "observing": {}, "residency": {}}
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        result["cells"] |= gradient_cells(mesh, name)
        result["steps"][name] = first_steps(mesh)
        result["skipping"][name] = skipping(mesh)
        result["observing"][name] = observing(mesh)
        result["residency"][name] = residency(mesh)
    return result


def main() -> None:
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2:]
    mesh = Mesh.create(Parallel())
    result = {"checkpoints": checkpoints(out, mesh.world)} if what == ["checkpoints"] else everything(mesh.world)
    write_result(out, mesh.rank, result)
    mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
