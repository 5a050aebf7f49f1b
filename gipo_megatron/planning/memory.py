"""Bytes on one GPU in each phase of an iteration: the state of the models, and the temporaries of a
call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from gipo_megatron.megatron.kv_budget import FRAGMENTATION, HOST_ROOM, Room, room_in
from gipo_megatron.megatron.meta_shard import Shard
from gipo_megatron.megatron.microbatches import padded_length
from gipo_megatron.megatron.precision import DTYPES, length_multiple
from gipo_megatron.planning.activations import Pass, Slot, forward, generation, need_of, training
from gipo_megatron.planning.arithmetic import BATCH, Call, Iteration, added_up
from gipo_megatron.planning.server import CONTEXT_BYTES, GIB, push, server_of
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Sampling, head_of


class State(NamedTuple):
    """Bytes of models on the device."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Phase:
    """A call on one rank."""

    call: Call
    state: State  # of all models that are on the device
    work: Pass
    moved: int = 0  # bytes between host and device when the call begins
    server: int = 0  # bytes that a rollout server takes on the same device, busy or not

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def peak(self) -> int:
        return sum(self.state) + self.work.peak + self.server

    def __add__(self, other: Phase) -> Phase:
        """Return both calls as one phase: the memory of the larger, the traffic of both."""
        larger = max(self, other, key=lambda phase: phase.peak)
        return replace(larger, call=self.call + other.call, moved=self.moved + other.moved)


@dataclass(frozen=True)
class Footprint:
    """The models, phases and host memory of one rank."""

    roles: dict[str, Shard]
    phases: tuple[Phase, ...]  # set-up, what is done once, an iteration, a save
    # bytes of host memory for the models that are offloaded; pinned in pieces of powers of two
    # (offload.pieces), so no more
    host: int
    # bytes of host memory that a save needs at most, on the first replica's rank and on another's
    staged: tuple[int, int]

    @property
    def shard(self) -> Shard:
        """The shard of any role."""
        return next(iter(self.roles.values()))

    @property
    def base(self) -> int:
        """Frozen weights that the roles share; the output layer is not in a critic's."""
        return max(shard.base for shard in self.roles.values())

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)


def budget(gpu_memory_gib: int) -> int:
    """Return the bytes of a GPU that a plan may fill."""
    return int(gpu_memory_gib * GIB * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def staging(gradients: int, replicas: int) -> tuple[int, int]:
    """Return the host memory in which mcore gathers a model's optimizer for a save: on the first
    replica's rank, and on another replica's.

    Masters and two moments are fp32, each as large as the gradient buffer. Every rank copies its
    share of the three. The first keeps the three whole, receives one at a time from all replicas,
    and joins it: that is three more, because the parts and the result of the last one stay.
    """
    share = 3 * gradients // replicas
    return share + 3 * gradients + 3 * gradients, share


@dataclass
class Device:
    """The rules of offload.Residency for all models of a process, in bytes instead of tensors."""

    recipe: Recipe
    shards: Mapping[str, Shard]
    present: dict[str, State] = field(default_factory=dict)
    base: int = 0  # frozen weights that models with adapters share

    def whole(self, role: str) -> State:
        shard = self.shards[role]
        return State(shard.weights, shard.gradients, shard.optimizer)

    def offloaded(self, role: str) -> bool:
        return self.recipe.models[role].offload == "cpu"

    def use(self, role: str, trains: bool = False) -> int:
        """Move `role` to the device, and other models that are offloaded to the host; return the
        bytes moved (gradients are not copied)."""
        if not self.offloaded(role):
            return 0
        moved = 0
        for other, state in self.present.items():
            if other != role and self.offloaded(other):
                moved += state.weights + state.optimizer
                self.present[other] = State()
        before, after = self.present[role], self.whole(role)
        if not trains and not before.optimizer:
            after = after._replace(gradients=before.gradients, optimizer=0)
        self.present[role] = after
        return moved + after.weights - before.weights + after.optimizer - before.optimizer

    @property
    def state(self) -> State:
        own = State(*map(sum, zip(*self.present.values(), strict=True)))
        return own._replace(weights=own.weights + self.base)

    def build(self, role: str) -> Phase:
        """Build a model. mcore then copies the weights of a trained one into one buffer and frees
        the first copy."""
        for other in self.present:
            if self.offloaded(other):
                self.present[other] = State()
        whole = self.whole(role)
        self.present[role] = whole
        self.base = max(self.base, self.shards[role].base)
        first_copy = whole.weights if role in self.recipe.trained else 0
        call = Call(f"set-up: {role}", "build", role)
        phase = Phase(call, self.state, Pass(layer=first_copy))
        if self.offloaded(role):
            self.present[role] = State()
            if self.recipe.models[role].load != "random":
                self.use(role, role in self.recipe.trained)
        return phase


def footprints(iteration: Iteration, stages: Sequence[dict[str, Shard]]) -> tuple[Footprint, ...]:
    """Return one rank of each of these pipeline stages. All generate as many rows at once as the
    one with the least room."""
    alone = [footprint(iteration, roles) for roles in stages]
    rows = [phase.work.rows for found in alone for phase in found.phases if phase.work.rows]
    if not rows:
        return tuple(alone)
    return tuple(footprint(iteration, roles, min(rows)) for roles in stages)


def footprint(
    iteration: Iteration, roles: dict[str, Shard], together: int | None = None
) -> Footprint:
    """Return the phases of one iteration on the rank that holds these shards.

    together: rows that generate at once, where other ranks of the replica have less room than this
    one.
    """
    recipe = iteration.recipe
    device = Device(recipe, roles)
    calls = Calls(iteration, device, together)
    built = [role for role in iteration.built if role != "reference" or not calls.swaps]
    set_up = [device.build(role) for role in built]
    once = []
    for call in iteration.once:
        device.build(call.role)
        once.append(calls.phase(call))
        device.present.pop(call.role)
    for _ in range(2):  # the second iteration is like all others
        usual = [calls.phase(call) for call in iteration.calls]
    saves = [calls.phase(Call("save", "save", role)) for role in recipe.trained]
    largest = max([*set_up, *once], key=lambda phase: phase.peak)
    phases = [*([largest] if largest in set_up else []), *once, *usual, *saves]
    server, first = server_of(iteration), next(iter(roles.values())).rank
    stage = range(first, first + recipe.world // recipe.parallel.pipeline)
    beside = 0 if server is None else server.beside(stage)
    return Footprint(
        roles=roles,
        phases=tuple(replace(phase, server=beside) for phase in added_up(phases)),
        host=sum(s.weights + s.optimizer for role, s in roles.items() if device.offloaded(role)),
        staged=staging(max(roles[role].gradients for role in recipe.trained), recipe.data_parallel),
    )


@dataclass(frozen=True)
class Calls:
    """Calls of roles as phases of one rank."""

    iteration: Iteration
    device: Device
    together: int | None = None

    @property
    def recipe(self) -> Recipe:
        return self.iteration.recipe

    @property
    def swaps(self) -> bool:
        """Return whether the reference is a host copy that is swapped into the actor's modules
        (training/assembly.py), without modules of the reference."""
        models = self.recipe.models
        return "reference" in models and models["reference"].offload == "cpu"

    @property
    def slot(self) -> Slot:
        return slot_of(self.iteration)

    def phase(self, call: Call) -> Phase:
        """Advance the device by one call."""
        swapped = call.role == "reference" and call.reads == BATCH and self.swaps
        role = "actor" if swapped else call.role
        shard = self.device.shards[role]
        moved = self.device.use(role, trains=call.verb in ("update", "save"))
        state = self.device.state
        if swapped:  # the actor's own weights are kept on the device meanwhile
            state = state._replace(weights=state.weights + shard.weights)
            moved += shard.weights
        if call.server is not None:
            work = push(self.recipe)
        elif call.verb == "generate":
            work = self._generate(call, shard)
        elif call.verb == "forward":
            work = forward(self.slot, shard.stage, head_of(role) is not None)
        elif call.verb == "update":
            work = self._update(call, shard)
        else:
            # nothing is beside a model that is saved: weights are copied to the host one tensor at
            # a time, and the optimizer is gathered in host memory (`staging`)
            work = Pass()
        return Phase(call, state, work, moved)

    def _generate(self, call: Call, shard: Shard) -> Pass:
        sampling = call.sampling
        assert sampling is not None
        longest, need = self.recipe.data.max_length, need_of(self.slot)
        room = self._room(longest - sampling.max_response, sampling)
        fit = min(self.iteration.rows_per_replica, room.rows(longest, need.token))
        return generation(self.slot, self.together or fit, longest, sampling, shard.stage)

    def _room(self, prompt: int, sampling: Sampling) -> Room:
        """Return the memory for rows beside the state that is on the device now."""
        total = self.recipe.hardware.gpu_memory_gib * GIB
        if not total:
            return HOST_ROOM
        free = total - CONTEXT_BYTES - sum(self.device.state)
        return room_in(free, total, need_of(self.slot), prompt, sampling)

    def _update(self, call: Call, shard: Shard) -> Pass:
        # master weights and two moments; in fp32 the weights are the masters
        states = 3 if self.recipe.precision.dtype == "bf16" else 2
        on_cpu = not self.recipe.hardware.gpu_memory_gib
        found = training(
            self.slot,
            self.recipe.memory.recompute,
            shard.chunk_layers,
            shard.stage,
            self.iteration.slots_of(call),
            head_of(call.role) is not None,
            moments=shard.optimizer // states if on_cpu else 0,  # a GPU's Adam is fused
        )
        if self.recipe.precision.fp8 == "none":
            return found
        # Transformer Engine keeps FP8 copies of each layer's weights, by rows and by columns, until
        # backward
        return replace(found, activations=found.activations + shard.weights + shard.base)


def slot_of(iteration: Iteration) -> Slot:
    """Return the largest micro-batch that the recipe allows."""
    recipe = iteration.recipe
    device = torch.device("cuda" if recipe.hardware.gpu_memory_gib else "cpu")
    widths = length_multiple(recipe.precision, recipe.parallel)
    width = padded_length(recipe.data.max_length, widths, device)
    # a budget is full of shorter rows where it is no multiple of the longest
    filled = -(-(recipe.batch.micro_tokens or 0) // width)
    return Slot(
        recipe.model.architecture,
        recipe.parallel,
        DTYPES[recipe.precision.dtype].itemsize,
        max(iteration.rows_per_slot * iteration.sequences_per_row, filled),
        width,
        device,
        recipe.model.adapter,
    )
