"""What a recipe's components ask the runner for: which models, which of them trained, and so which
keys are read."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gipo_megatron.recipe import registry
from gipo_megatron.recipe.schema import ROLES, TRAINING_KEYS, Evaluation
from gipo_megatron.recipe.source import Block, Leaf, Node

ROLLOUT_KEYS = (
    "batch.prompts",
    "batch.responses",
    *(f"evaluation.{f.name}" for f in fields(Evaluation)),
    "run.stop.kl_above",
)


@dataclass(frozen=True)
class Needs:
    """What the algorithm and its components ask the runner for."""

    runtime: frozenset[str]
    roles: tuple[str, ...]  # models to load
    trained: tuple[str, ...]  # those of them that the algorithm updates
    optional: tuple[str, ...] = ()  # roles that the algorithm uses only if a component needs them

    @property
    def rollout(self) -> bool:
        return "prompts" in self.runtime


def needed(tree: Block) -> Needs:
    """Roles and runtime objects that the (completed) recipe's components ask for."""
    asked: set[str] = set()
    roles: list[str] = []
    trained: list[str] = []
    optional: list[str] = []
    needed_by_component: set[str] = set()

    def visit(node: Node | None, slot: str, outermost: bool) -> None:
        name = node.children.get("name") if isinstance(node, Block) else None
        cls = (
            registry.lookup(slot, name.value)
            if isinstance(name, Leaf) and isinstance(name.value, str)
            else None
        )
        if cls is None:
            return
        assert isinstance(node, Block)
        needed_by_component.update(getattr(cls, "needs", ()))
        for f in registry.runtime_fields(cls):
            asked.add(f.metadata["runtime"])
            if f.metadata["runtime"] in ROLES:
                roles.append(f.metadata["runtime"])
            if f.metadata["optional"]:
                optional.append(f.metadata["runtime"])
        if outermost:
            trained.extend(cls.trained)  # type: ignore[attr-defined]
        if "reward_models" in (f.metadata["runtime"] for f in registry.runtime_fields(cls)):
            members = node.children.get("members")
            roles.extend(
                map(str, members.value)
                if isinstance(members, Leaf) and isinstance(members.value, list)
                else ["reward"]
            )
        for f in registry.component_fields(cls):
            visit(node.children.get(f.name), f.metadata["slot"], False)

    visit(tree.children.get("algorithm"), "algorithm", True)
    built = [
        role
        for role in dict.fromkeys([*roles, *sorted(needed_by_component)])
        if role in needed_by_component or role not in optional
    ]
    updated = tuple(role for role in trained if role in built)
    return Needs(frozenset(asked), tuple(built), updated, tuple(optional))


def is_role(name: str) -> bool:
    return name in ROLES or name.startswith("reward_")


def unneeded(key: str, needs: Needs) -> bool:
    """Whether `key` belongs to a model that nothing in the recipe asks for."""
    parts = key.split(".")
    return (
        len(parts) > 1
        and parts[0] == "models"
        and is_role(parts[1])
        and parts[1] not in needs.roles
    )


def pruned(tree: Block, needs: Needs) -> Block:
    """The tree without what this recipe never reads, so that it can be read again as a recipe."""
    drop = {
        f"models.{role}.{key}"
        for role in needs.roles
        if role not in needs.trained
        for key in TRAINING_KEYS
    }
    drop |= set() if needs.rollout else {"evaluation", *ROLLOUT_KEYS}

    def keep(block: Block, path: str) -> Block:
        children = {
            key: child
            for key, child in block.children.items()
            if path + key not in drop and not unneeded(path + key, needs)
        }
        below = {
            key: keep(child, f"{path}{key}.") if isinstance(child, Block) else child
            for key, child in children.items()
        }
        return Block(below, block.origin)

    return keep(tree, "")
