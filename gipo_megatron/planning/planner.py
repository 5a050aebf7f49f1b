"""A recipe's plan: layout, sizes, phases, batch, time, on the ranks that can be the heaviest."""

from __future__ import annotations

from dataclasses import dataclass, field

from gipo_megatron.megatron.meta_shard import Shard, build, groups, pretend
from gipo_megatron.planning.arithmetic import Iteration
from gipo_megatron.planning.compute import Timing, timing
from gipo_megatron.planning.counting import count
from gipo_megatron.planning.memory import Footprint, budget, footprints
from gipo_megatron.planning.server import Server, server_of
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import AdapterSpec, Architecture, Parallel, Precision, head_of

Kind = tuple[str | None, bool, AdapterSpec]  # scalar head, trained, adapters


@dataclass(frozen=True)
class Plan:
    iteration: Iteration
    groups: dict[str, list[list[int]]]  # tensor, pipeline, data -> global ranks of every group
    gpus_per_node: int
    # role -> parameters of the whole model; where roles share a base, without it
    parameters: dict[str, int]
    base_parameters: int
    footprints: tuple[Footprint, ...]  # first, second and last pipeline stage
    time: Timing | None  # None: on a CPU

    @property
    def recipe(self) -> Recipe:
        return self.iteration.recipe

    @property
    def heaviest(self) -> Footprint:
        return max(self.footprints, key=lambda found: found.worst.peak)

    @property
    def limit(self) -> int:
        """Bytes that may be filled; 0 on a CPU."""
        memory = self.recipe.hardware.gpu_memory_gib
        return budget(memory) if memory else 0

    @property
    def server(self) -> Server | None:
        return server_of(self.iteration)

    @property
    def fits(self) -> bool:
        """Return whether the models fit beside the server, and the server into its share."""
        if self.limit and self.heaviest.worst.peak > self.limit:
            return False
        return self.server is None or self.server.fits

    @property
    def saving(self) -> int:
        """Return an upper bound of the host memory for a save, on the node with most ranks of the
        first replica."""
        firsts = [rank // self.gpus_per_node for rank, *_ in self.groups["data"]]
        most = max(firsts.count(node) for node in set(firsts))
        ranks = min(self.gpus_per_node, self.recipe.world)
        first, other = self.heaviest.staged
        return most * first + (ranks - most) * other

    def spanning(self, kind: str) -> int:
        """Return the number of groups of a kind that have ranks on several nodes."""
        groups = self.groups[kind]
        return sum(len({rank // self.gpus_per_node for rank in group}) > 1 for group in groups)


@dataclass
class Planner:
    """Plans recipes. Keeps the shards: candidates that differ in batch or memory share them."""

    shards: dict[tuple, dict[Kind, Shard]] = field(default_factory=dict)

    def plan(self, recipe: Recipe) -> Plan:
        """Plan one recipe.

        Raises UserError when a model cannot be split like that, or when the calls of the algorithm
        cannot be counted.
        """
        last, per_node = recipe.parallel.pipeline - 1, recipe.hardware.per_node
        second = min(1, last)
        stages = {stage: self._roles(recipe, stage) for stage in sorted({0, second, last})}
        between = max(0, last - 1)
        all_stages = [stages[0], *[stages[last]] * (last > 0), *[stages[second]] * between]
        iteration = count(recipe)
        found = footprints(iteration, list(stages.values()))
        heaviest = max(found, key=lambda footprint: footprint.worst.peak)
        on_gpu = recipe.hardware.gpu_memory_gib > 0
        return Plan(
            iteration=iteration,
            groups=groups(recipe.parallel, recipe.world),
            gpus_per_node=per_node,
            parameters={
                role: sum(shards[role].parameters for shards in all_stages)
                for role in recipe.models
            },
            base_parameters=sum(
                max(shard.base_parameters for shard in shards.values()) for shards in all_stages
            ),
            footprints=found,
            time=timing(iteration, heaviest, per_node) if on_gpu else None,
        )

    def _roles(self, recipe: Recipe, stage: int) -> dict[str, Shard]:
        """Return the shards of a stage's first rank: its first tensor rank, its first replica."""
        adapter = recipe.model.adapter
        kinds = {role: (head_of(role), role in recipe.trained, adapter) for role in recipe.models}
        architecture, parallel, world = recipe.model.architecture, recipe.parallel, recipe.world
        key = (repr(architecture), parallel, recipe.precision.dtype, world, stage)
        known = self.shards.setdefault(key, {})
        if missing := set(kinds.values()) - known.keys():
            rank = stage * (world // parallel.pipeline)
            known |= build_shards(architecture, parallel, recipe.precision, world, rank, missing)
        return {role: known[kind] for role, kind in kinds.items()}


def build_shards(
    architecture: Architecture,
    parallel: Parallel,
    precision: Precision,
    world: int,
    rank: int,
    kinds: set[Kind],
) -> dict[Kind, Shard]:
    """Return the part of such models that `rank` holds."""
    with pretend(parallel, world, rank) as mesh:
        return {
            kind: build(
                architecture, mesh, precision, head=kind[0], trained=kind[1], adapter=kind[2]
            )
            for kind in kinds
        }
