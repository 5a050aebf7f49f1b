"""The components that a recipe chooses, and so the models it loads and the keys it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from gipo_megatron import registry
from gipo_megatron.recipe.schema import ROLES, TRAINING_KEYS, Evaluation
from gipo_megatron.recipe.source import MISSING, Block, Node
from gipo_megatron.recipe.validate import with_name

ROLLOUT_KEYS = (
    "batch.prompts",
    "batch.responses",
    *(f"evaluation.{f.name}" for f in fields(Evaluation)),
    "run.stop.kl_above",
)


@dataclass(frozen=True)
class Needs:
    """Components, runtime objects and models of an algorithm."""

    components: dict[str, type]  # key of its block -> class; misspelt ones are left out
    runtime: frozenset[str]  # names of from_runtime fields
    roles: tuple[str, ...]  # models to load
    trained: tuple[str, ...]  # those of them that the algorithm updates
    # roles that are loaded only where a component needs them; gold: where its load is not empty
    optional: tuple[str, ...]

    @property
    def rollout(self) -> bool:
        return "prompts" in self.runtime

    def idle(self, key: str) -> bool:
        """Return whether `key` belongs to a model that nothing in the recipe needs."""
        section, _, rest = key.partition(".")
        role = rest.split(".")[0]
        return section == "models" and is_role(role) and role not in self.roles


def needed(tree: Block) -> Needs:
    """Return the needs of a recipe's components; of those without a name, of their defaults."""
    components: dict[str, type] = {}
    runtime: list[str] = []
    roles: list[str] = []
    optional: list[str] = []
    for key, cls, block in _chosen(tree.children.get("algorithm"), "algorithm", "", "algorithm"):
        components[key] = cls
        for about in (f.metadata for f in registry.runtime_fields(cls)):
            runtime.append(about["runtime"])
            if about["runtime"] in ROLES:
                (optional if about["optional"] else roles).append(about["runtime"])
            listed = block.value(about["roles_key"]) if about["roles_key"] else []
            roles += map(str, listed) if isinstance(listed, list) else []
        roles += getattr(cls, "needs", ())
    if "gold" in optional and tree.value("models.gold.load") not in ("", MISSING):
        roles.append("gold")
    needed = tuple(dict.fromkeys(roles))
    trained = getattr(components.get("algorithm"), "trained", ())
    updated = tuple(role for role in trained if role in needed)
    return Needs(components, frozenset(runtime), needed, updated, tuple(optional))


def _chosen(
    node: Node | None, slot: str, default: str, key: str
) -> Iterator[tuple[str, type, Block]]:
    """(key, class, block) of a component, then of those nested in it."""
    block = with_name(node, default)
    cls = registry.lookup(slot, block.value("name"))
    if cls is None:
        return
    yield key, cls, block
    for f in registry.component_fields(cls):
        about = f.metadata
        nested = block.children.get(f.name)
        yield from _chosen(nested, about["slot"], about["default"], f"{key}.{f.name}")


def is_role(name: str) -> bool:
    return name in ROLES or name.startswith("reward_")


def pruned(tree: Block, needs: Needs) -> Block:
    """Return the tree without the keys that this recipe does not read."""
    frozen = [role for role in needs.roles if role not in needs.trained]
    drop = {f"models.{role}.{key}" for role in frozen for key in TRAINING_KEYS}
    drop |= set() if needs.rollout else {"evaluation", *ROLLOUT_KEYS}
    drop |= set() if tree.value("data.format") == "planted" else {"data.planted"}

    def keep(block: Block, path: str) -> Block:
        children: dict[str, Node] = {}
        for name, child in block.children.items():
            key = f"{path}{name}"
            if key not in drop and not needs.idle(key):
                children[name] = keep(child, f"{key}.") if isinstance(child, Block) else child
        return Block(children, block.origin)

    return keep(tree, "")
