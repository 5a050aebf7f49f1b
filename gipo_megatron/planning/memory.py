"""What lies on one GPU in each phase of an iteration: the models' state as residency.Residency
moves it, and what the phase works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gipo_megatron.megatron.kv_budget import FRAGMENTATION, HOST_ROOM, Room, room_in
from gipo_megatron.megatron.meta_shard import Shard
from gipo_megatron.megatron.microbatches import padded_length
from gipo_megatron.megatron.precision import DTYPES, length_multiple
from gipo_megatron.planning.activations import Pass, Slot, forward, generation, need_of, training
from gipo_megatron.planning.arithmetic import batch_plan
from gipo_megatron.recipe import registry
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Sampling

GIB = 2**30
CONTEXT_BYTES = 2 * GIB  # CUDA context, kernels, NCCL's buffers


@dataclass(frozen=True)
class State:
    """Bytes of models on the device."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: State) -> State:
        return State(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Phase:
    """One phase on one rank."""

    name: str
    state: State  # of all models that are on the device
    work: Pass
    moved: int = 0  # bytes between host and device at its start

    @property
    def peak(self) -> int:
        return self.state.total + self.work.peak


@dataclass(frozen=True)
class Footprint:
    """One rank: what it holds of each role, its phases, and what is parked on the host."""

    rank: int
    stage: int
    roles: dict[str, Shard]
    phases: tuple[Phase, ...]
    # bytes of host memory of this rank for all that is offloaded; pinned in powers of two
    # (residency.pieces), so no more
    host: int
    # bytes of host memory that a save needs at most, on the first replica's rank and on another's
    staged: tuple[int, int]

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)


def budget(gpu_memory_gib: int) -> int:
    """Bytes of a GPU that a plan may fill."""
    return int(gpu_memory_gib * GIB * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def staging(gradients: int, replicas: int) -> tuple[int, int]:
    """Host memory in which mcore gathers a model's optimizer for a save: on the first replica's
    rank, and on another replica's.

    Masters and two moments are fp32, each as large as the gradient buffer. Every rank copies its
    share of the three. The first keeps the three whole, receives one at a time from all replicas,
    and joins it: that is three more, as what it received and joined last is still there.
    """
    share = 3 * gradients // replicas
    return share + 3 * gradients + 3 * gradients, share


def head_of(role: str) -> str | None:
    """What stands in the place of the output layer, as assembly.py builds the roles."""
    return "value" if role == "critic" else "score" if role.startswith("reward") else None


def swapped(recipe: Recipe) -> bool:
    """Whether the reference is a host copy in the actor's modules (assembly.RoleBuilder.reference),
    without a model of its own."""
    return (
        "reference" in recipe.models
        and recipe.models["reference"].offload == "cpu"
        and not precomputed(recipe)
    )


def precomputed(recipe: Recipe) -> bool:
    """Whether the reference answers once, before the first step, and is freed."""
    return recipe.algorithm["name"] == "dpo" and bool(recipe.algorithm["precompute"])


@dataclass
class Device:
    """residency.Residency over all models of a process, in bytes instead of tensors."""

    recipe: Recipe
    shards: Mapping[str, Shard]
    present: dict[str, State] = field(default_factory=dict)

    def whole(self, role: str) -> State:
        s = self.shards[role]
        return State(s.weights, s.gradients, s.optimizer)

    def offloaded(self, role: str) -> bool:
        return self.recipe.models[role].offload == "cpu"

    def use(self, role: str, trains: bool = False) -> int:
        """Bytes moved to have `role` on the device; other models that are offloaded go to the host
        (gradients are not copied)."""
        if not self.offloaded(role):
            return 0
        moved = 0
        for other, state in self.present.items():
            if other != role and self.offloaded(other):
                moved += state.weights + state.optimizer
                self.present[other] = State()
        before, whole = self.present[role], self.whole(role)
        after = (
            whole
            if trains or before.optimizer
            else replace(whole, gradients=before.gradients, optimizer=0)
        )
        self.present[role] = after
        return moved + after.weights - before.weights + after.optimizer - before.optimizer

    @property
    def state(self) -> State:
        return sum(self.present.values(), State())

    def build(self, role: str) -> Phase:
        """Made whole; mcore copies the weights of a trained model into one buffer, then the first
        copy goes."""
        for other in self.present:
            if self.offloaded(other):
                self.present[other] = State()
        whole = self.whole(role)
        self.present[role] = whole
        first_copy = whole.weights if role in self.recipe.trained else 0
        phase = Phase(f"set-up: {role}", self.state, Pass(layer=first_copy))
        if self.offloaded(role):
            self.present[role] = State()
            if self.recipe.models[role].load != "random":
                self.use(role, role in self.recipe.trained)
        return phase


def footprints(recipe: Recipe, stages: Sequence[dict[str, Shard]]) -> tuple[Footprint, ...]:
    """One rank of each of these pipeline stages. All generate as many rows at once as the one with
    the least room."""
    alone = [footprint(recipe, roles) for roles in stages]
    rows = [phase.work.rows for found in alone for phase in found.phases if phase.work.rows]
    return tuple(footprint(recipe, roles, min(rows)) for roles in stages) if rows else tuple(alone)


def footprint(recipe: Recipe, roles: dict[str, Shard], together: int | None = None) -> Footprint:
    """The phases of one iteration on the rank whose shards these are, set-up first; each phase at
    its most.

    together: rows that generate at once, where other ranks of the replica have less room than this
    one.
    """
    device = Device(recipe, roles)
    order = [
        role
        for role in ("actor", "critic", *(r for r in roles if r.startswith("reward")), "reference")
        if role in roles
    ]
    phases: list[Phase] = []
    for role in order:
        if role == "reference" and (precomputed(recipe) or swapped(recipe)):
            continue
        phases.append(device.build(role))
    if precomputed(recipe):
        device.build("reference")
        phases.append(
            Calls(recipe, roles, device).forward("reference, all pairs, once", "reference")
        )
        device.present.pop("reference")
    set_up = max(phases, key=lambda phase: phase.peak)
    once = [phase for phase in phases if "once" in phase.name]
    for _ in range(2):  # the second time round is like all others
        iteration = _iteration(recipe, Calls(recipe, roles, device, together))
    save = Calls(recipe, roles, device, together).save()
    host = sum(s.weights + s.optimizer for role, s in roles.items() if device.offloaded(role))
    staged = staging(max(roles[role].gradients for role in recipe.trained), recipe.data_parallel)
    any_role = next(iter(roles.values()))
    named = [set_up] if set_up not in once else []
    return Footprint(
        any_role.rank, any_role.stage, roles, (*named, *once, *iteration, save), host, staged
    )


def _iteration(recipe: Recipe, calls: Calls) -> list[Phase]:
    """In the order of algorithms/*.py."""
    block = recipe.algorithm
    if block["name"] == "ppo":
        rewards = [role for role in recipe.models if role.startswith("reward")]
        classifier: Any = registry.lookup("group_classifier", block["group_classifier"]["name"])
        phases = [calls.generate("rollout", "actor")]
        phases += [calls.forward(f"{role} scores", role) for role in rewards]
        phases += [
            calls.forward("actor log-probs", "actor"),
            calls.reference(),
            calls.forward("critic values", "critic"),
        ]
        phases += [calls.update("critic update", "critic"), calls.update("actor update", "actor")]
        if classifier.head is not None:
            phases.append(calls.forward("group probe", "critic"))
        return phases
    (role,) = recipe.trained
    before = [calls.reference()] if "reference" in recipe.models and not precomputed(recipe) else []
    return [*before, calls.update(f"{role} update", role)]


@dataclass(frozen=True)
class Calls:
    """The verbs of roles.py, each as a phase."""

    recipe: Recipe
    shards: Mapping[str, Shard]
    device: Device
    together: int | None = None

    @property
    def slot(self) -> Slot:
        return slot_of(self.recipe)

    def _phase(
        self, name: str, role: str, work: Callable[[Shard], Pass], trains: bool = False
    ) -> Phase:
        moved = self.device.use(role, trains)
        return Phase(name, self.device.state, work(self.shards[role]), moved)

    def generate(self, name: str, role: str) -> Phase:
        batch, block, slot = batch_plan(self.recipe), self.recipe.algorithm["rollout"], self.slot
        sampling = Sampling(batch.max_response, top_k=block["top_k"], top_p=block["top_p"])

        def work(shard: Shard) -> Pass:
            room = self._room(batch.max_length - batch.max_response, sampling)
            fit = min(batch.rows_per_replica, room.rows(batch.max_length, need_of(slot).token))
            return generation(slot, self.together or fit, batch.max_length, sampling, shard.stage)

        return self._phase(name, role, work)

    def _room(self, prompt: int, sampling: Sampling) -> Room:
        """What is left for rows beside the state that is on the device now."""
        total = self.recipe.hardware.gpu_memory_gib * GIB
        if not total:
            return HOST_ROOM
        return room_in(
            total - CONTEXT_BYTES - self.device.state.total,
            total,
            need_of(self.slot),
            prompt,
            sampling,
        )

    def forward(self, name: str, role: str) -> Phase:
        return self._phase(
            name, role, lambda shard: forward(self.slot, shard.stage, head_of(role) is not None)
        )

    def reference(self) -> Phase:
        """Its own model; or its weights in the actor's place, whose own are kept beside on the
        device meanwhile."""
        if not swapped(self.recipe):
            return self.forward("reference log-probs", "reference")
        phase, weights = self.forward("reference log-probs", "actor"), self.shards["actor"].weights
        return replace(
            phase, state=phase.state + State(weights=weights), moved=phase.moved + weights
        )

    def update(self, name: str, role: str) -> Phase:
        batch, head = batch_plan(self.recipe), head_of(role) is not None
        # master weights and two moments; in fp32 the weights are the masters
        states = 3 if self.recipe.precision.dtype == "bf16" else 2
        on_cpu = not self.recipe.hardware.gpu_memory_gib

        def work(shard: Shard) -> Pass:
            recompute = self.recipe.memory.recompute
            moments = shard.optimizer // states if on_cpu else 0  # a GPU's Adam is fused
            found = training(
                self.slot, recompute, shard.chunk_layers, shard.stage, batch.slots, head, moments
            )
            if self.recipe.precision.fp8 == "none":
                return found
            # Transformer Engine keeps FP8 copies of each layer's weights, by rows and by columns,
            # until backward
            return replace(found, activations=found.activations + shard.weights)

        return self._phase(name, role, work, trains=True)

    def save(self) -> Phase:
        """One trained model after the other, on the device for it. Nothing is beside it there:
        weights are copied to the host one tensor at a time, and the optimizer is gathered in host
        memory (`staging`)."""
        phases = [
            self._phase("save", role, lambda shard: Pass(), trains=True)
            for role in self.recipe.trained
        ]
        return replace(
            max(phases, key=lambda phase: phase.peak), moved=sum(phase.moved for phase in phases)
        )


def slot_of(recipe: Recipe) -> Slot:
    """The largest micro-batch that the recipe allows."""
    batch, widths = batch_plan(recipe), length_multiple(recipe.precision, recipe.parallel)
    device = torch.device("cuda" if recipe.hardware.gpu_memory_gib else "cpu")
    length = padded_length(batch.max_length, widths, device)
    itemsize = DTYPES[recipe.precision.dtype].itemsize
    return Slot(
        recipe.model.architecture,
        recipe.parallel,
        itemsize,
        batch.micro_batch * batch.sequences_per_row,
        length,
        device,
    )
