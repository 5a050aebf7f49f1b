"""A recipe's plan: layout, sizes, phases, batch, time. Builds meta shards of the ranks that can be
the heaviest."""

from __future__ import annotations

from dataclasses import dataclass, field

from gipo_megatron.megatron.meta_shard import Shard, build, groups, pretend
from gipo_megatron.planning.arithmetic import BatchPlan, batch_plan
from gipo_megatron.planning.compute import Timing, timing
from gipo_megatron.planning.memory import Footprint, budget, footprints, head_of
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Architecture, Parallel, Precision

NODE = 8  # GPUs a node, unless the recipe has fewer


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    groups: dict[str, list[list[int]]]  # tensor, pipeline, data -> global ranks of every group
    gpus_per_node: int
    parameters: dict[str, int]  # role -> of the whole model
    footprints: tuple[Footprint, ...]  # first, second and last pipeline stage
    batch: BatchPlan
    time: Timing | None  # None: on a CPU

    @property
    def heaviest(self) -> Footprint:
        return max(self.footprints, key=lambda found: found.worst.peak)

    @property
    def limit(self) -> int:
        """Bytes that may be filled; 0: on a CPU, no limit is known."""
        memory = self.recipe.hardware.gpu_memory_gib
        return budget(memory) if memory else 0

    @property
    def fits(self) -> bool:
        return not self.limit or self.heaviest.worst.peak <= self.limit

    @property
    def saving(self) -> int:
        """Bytes of host memory that a save needs at most on the node with most ranks of the first
        replica."""
        firsts = [rank // self.gpus_per_node for rank, *_ in self.groups["data"]]
        most = max(firsts.count(node) for node in set(firsts))
        ranks = min(self.gpus_per_node, self.recipe.world)
        first, other = self.heaviest.staged
        return most * first + (ranks - most) * other

    def spanning(self, kind: str) -> int:
        """How many groups of a kind have ranks on several nodes."""
        return sum(
            len({rank // self.gpus_per_node for rank in group}) > 1 for group in self.groups[kind]
        )


@dataclass
class Planner:
    """Remembers shards: candidates that differ in batch or memory switches share them."""

    shards: dict[tuple, Shard] = field(default_factory=dict)

    def plan(self, recipe: Recipe) -> Plan:
        """Raises UserError when the model cannot be split as the recipe says."""
        stages = recipe.parallel.pipeline
        found = {
            stage: self._roles(recipe, stage)
            for stage in sorted({0, min(1, stages - 1), stages - 1})
        }
        parameters = {}
        for role in recipe.models:
            middle = found[min(1, stages - 1)][role].parameters * max(0, stages - 2)
            ends = [found[stage][role].parameters for stage in {0, stages - 1}]
            parameters[role] = sum(ends) + middle
        looked_at = footprints(recipe, list(found.values()))
        per_node = min(recipe.hardware.gpus or NODE, NODE)
        heaviest = max(looked_at, key=lambda candidate: candidate.worst.peak)
        return Plan(
            recipe=recipe,
            groups=groups(recipe.parallel, recipe.world),
            gpus_per_node=per_node,
            parameters=parameters,
            footprints=looked_at,
            batch=batch_plan(recipe),
            time=timing(recipe, heaviest, per_node) if recipe.hardware.gpu_memory_gib else None,
        )

    def _roles(self, recipe: Recipe, stage: int) -> dict[str, Shard]:
        """The shards of a stage's first rank: its first tensor rank, its first replica."""
        kinds = {role: (head_of(role), role in recipe.trained) for role in recipe.models}
        architecture, parallel, precision, world = (
            recipe.model.architecture,
            recipe.parallel,
            recipe.precision,
            recipe.world,
        )
        keys = {
            role: (repr(architecture), parallel, precision.dtype, world, stage, *kind)
            for role, kind in kinds.items()
        }
        if any(key not in self.shards for key in keys.values()):
            rank = stage * (world // parallel.pipeline)
            built = build_shards(
                architecture, parallel, precision, world, rank, set(kinds.values())
            )
            self.shards |= {keys[role]: built[kind] for role, kind in kinds.items()}
        return {role: self.shards[key] for role, key in keys.items()}


def build_shards(
    architecture: Architecture,
    parallel: Parallel,
    precision: Precision,
    world: int,
    rank: int,
    kinds: set[tuple[str | None, bool]],
) -> dict[tuple[str | None, bool], Shard]:
    """(head, trained) -> what `rank` holds of such a model."""
    with pretend(parallel, world, rank) as mesh:
        return {
            (head, trained): build(architecture, mesh, precision, head=head, trained=trained)
            for head, trained in kinds
        }
