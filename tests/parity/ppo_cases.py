"""The real PPO page on Megatron roles, from one stored rollout: its gradients, R_g, masses and w
against tests/parity/plain_ppo.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.components.groups import CriticHead
from gipo_megatron.components.kl import GroupAdaptiveKL
from gipo_megatron.components.reward import FunctionReward
from gipo_megatron.components.rollout import Rollouts
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic
from gipo_megatron.metrics import Metric
from gipo_megatron.types import (
    CriticOutput,
    Groups,
    Prompts,
    Rollout,
    Rows,
    Sequences,
    TokenStats,
    Update,
    Weights,
)
from tests.parity import plain_ppo as plain
from tests.parity import tiny
from tests.parity.roles import fill, mine, new_actor, new_critic
from tests.parity.tiny import relative_errors


@dataclass
class OffPolicy:
    """A role that answers with older weights, and whose update takes the gradient alone: the page
    sees an actor, or a critic."""

    role: Any
    old: list[Tensor]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def logprobs(self, batch: Rows, entropy: bool = False) -> TokenStats:
        with self.role.engine.swapped(self.old):
            return self.role.logprobs(batch, entropy)

    def evaluate(self, batch: Rows) -> CriticOutput:
        with self.role.engine.swapped(self.old):
            return self.role.evaluate(batch)

    def update(self, *parts: Any) -> Update:
        engine = self.role.engine
        metrics, bad = engine.backward(parts, self.role.readout)
        assert bad == []
        found = dict(engine.gradients())
        head = engine.group_head
        if head is not None:
            norm = head.reduce_gradients()
            if engine.mesh.is_last_stage:
                found |= {
                    "group.weight": head.weight.grad.clone(),
                    "group.bias": head.bias.grad.clone(),
                }
                torch.testing.assert_close(
                    norm, float(torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm())
                )
        self.gradients.append(found)
        return Update({**metrics, "grad_norm": Metric.mean(1.0)})


@dataclass
class Stored(Rollouts):
    """A sampler that has its rollout already."""

    stored: Rollout | None = None

    def sample(self, actor: Any, prompts: Prompts, step: int) -> Rollout:
        assert self.stored is not None
        return self.stored


@dataclass
class Watched:
    """A variance regulariser that keeps its input and its output."""

    inner: GroupVariance
    groups: Groups | None = None
    found: Weights | None = None

    def weights(self, groups: Groups) -> Weights:
        self.groups, self.found = groups, self.inner.weights(groups)
        return self.found


def new_roles(mesh: Mesh, **changes: Any) -> tuple[OffPolicy, OffPolicy, OffPolicy]:
    """Actor, reference (a copy of its own, swapped into the actor) and critic."""
    actor: MegatronActor = new_actor(mesh, **changes)
    critic: MegatronCritic = new_critic(mesh, **changes)
    assert critic.engine.group_head is not None
    with torch.no_grad():
        for p, value in zip(critic.engine.group_head.parameters(), plain.group_head(), strict=True):
            p.copy_(value)
    copies, adapted = {}, "adapter" in changes
    for version in ("old", "reference", "live"):
        for name, role in (("actor", actor), ("critic", critic)):
            copies[name, version] = fill(role, plain.hf_model(version, adapted)).engine.snapshot()
    return (
        OffPolicy(actor, copies["actor", "old"]),
        OffPolicy(actor, copies["actor", "reference"]),
        OffPolicy(critic, copies["critic", "old"]),
    )


def make_ppo(
    mesh: Mesh, roles: tuple[OffPolicy, OffPolicy, OffPolicy], regulariser: Watched
) -> PPO:
    dp = mesh.data_parallel
    classifier = CriticHead(beta_critic=plain.BETA_CRITIC, entropy=plain.LABEL_ENTROPY)
    controller = GroupAdaptiveKL(eta=plain.ETA, floor=plain.FLOOR, ceiling=plain.CEILING, dp=dp)
    controller.load_state_dict({"leads": {0: 0.0, plain.HIGH: plain.GAP}, "level": plain.ETA})
    rollout = mine(mesh, plain.stored_rollout())
    assert isinstance(rollout, Rollout)
    probe = rollout.sequences
    ppo = PPO(
        clip=plain.CLIP,
        value_clip=plain.VALUE_CLIP,
        critic_warmup=0,
        entropy=plain.ENTROPY,
        ptx=plain.PTX,
        rollout=Stored(correction="truncated", correction_cap=plain.CAP, stored=rollout),
        reward=FunctionReward(
            "tests.parity.plain_ppo:stored_score",
            length_penalty=plain.LENGTH_PENALTY,
            clip=plain.SHAPED_CLIP,
            dp=dp,
        ),
        group_classifier=classifier,
        variance_regulariser=regulariser,  # type: ignore[arg-type]
        kl_controller=controller,
        advantage=GeneralisedAdvantage(gamma=plain.GAMMA, lam=plain.LAM, dp=dp),
        actor=roles[0],  # type: ignore[arg-type]
        reference=roles[1],
        critic=roles[2],
        dp=dp,
        minibatch=plain.MINIBATCH,
        prompts=lambda step: Prompts(
            probe.tokens, probe.prompt_lengths, probe.ids, probe.ids, rollout.source, rollout.extras
        ),
        examples=lambda step: _sequences(mine(mesh, tiny.pretraining())),
        probe=probe,
        sources=plain.SOURCES,
        timer=lambda name: nullcontext(),
    )
    ppo.tracker.high = plain.HIGH
    return ppo


def _sequences(rows: Rows) -> Sequences:
    assert isinstance(rows, Sequences)
    return rows


def ppo_cells(
    mesh: Mesh, layout: str, micro_batches: tuple[int, ...], **changes: Any
) -> dict[str, dict[str, float]]:
    """{layout/actor/1: {tensor: relative error over both minibatches}, …/critic/1, …/groups/1:
    {quantity: largest difference}}."""
    expected = plain.plain_step(adapted="adapter" in changes)
    roles, cells = new_roles(mesh, **changes), {}
    for micro_batch in micro_batches:
        for role in roles:
            role.role.engine.micro_batch, role.gradients = micro_batch, []
        watched = Watched(
            GroupVariance(beta=plain.BETA, min_weight=plain.LOW, max_weight=plain.HIGH_WEIGHT)
        )
        result = make_ppo(mesh, roles, watched).step(0)
        assert not result.skipped
        cells[f"{layout}/groups/{micro_batch}"] = _group_errors(mesh, watched, expected)
        for name, role, wanted in (
            ("actor", roles[0], expected.actor),
            ("critic", roles[2], expected.critic),
        ):
            assert len(role.gradients) == len(wanted) == 2
            cells[f"{layout}/{name}/{micro_batch}"] = _gradient_errors(mesh, role.gradients, wanted)
    return cells


def _group_errors(mesh: Mesh, watched: Watched, expected: plain.Plain) -> dict[str, float]:
    groups, weights, data = watched.groups, watched.found, mesh.data_parallel
    assert groups is not None and weights is not None and groups.count == len(expected.weights)
    own = slice(data.rank, None, data.size)
    uniform = GroupVariance(beta=plain.BETA, min_weight=-9.0, max_weight=9.0).weights(
        Groups(**{**vars(groups), "variance": "uniform"})
    )
    found = {
        "returns": groups.group_means - expected.returns,
        "masses": groups.masses - expected.masses,
        "weights": weights.values - expected.weights[own],
        "uniform_weights": uniform.values - expected.uniform_weights[own],
    }
    return {name: float(x.abs().max()) for name, x in found.items()}


def _gradient_errors(
    mesh: Mesh, found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]
) -> dict[str, float]:
    """The worse of the two minibatches, per tensor; the group head's are on the last stage only."""
    errors: dict[str, float] = {}
    for mine_, theirs in zip(found, wanted, strict=True):
        here = (
            theirs
            if mesh.is_last_stage
            else {k: v for k, v in theirs.items() if not k.startswith("group.")}
        )
        for name, error in relative_errors(mine_, here).items():
            errors[name] = max(error, errors.get(name, 0.0))
    return errors
