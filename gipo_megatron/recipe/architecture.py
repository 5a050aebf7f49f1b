"""The architecture of the weights to load, read from their config.json or meta.json, so that no
recipe retypes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.check import may_be_hub
from gipo_megatron.recipe.problems import Problem
from gipo_megatron.recipe.source import COMMAND_LINE, MISSING, Block, Leaf, Node
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.architecture import stored_architecture

KEY = "model.architecture"
FIELDS = tuple(f.name for f in dataclasses.fields(Architecture))
REQUIRED = frozenset(
    f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING
)
FROM_WEIGHTS = "model/from_weights"  # the fragment that takes a written architecture back


@dataclass(frozen=True)
class Source:
    """A recipe key that names weights."""

    key: str  # models.actor.load
    load: str  # its value; ??? where it has none yet
    origin: str  # who wrote it
    role: str  # whose weights they are; empty for model.hub


@dataclass(frozen=True)
class Found:
    """What weights say of themselves."""

    source: Source
    path: str  # the file that says it
    values: dict[str, Any]  # of Architecture


@dataclass(frozen=True)
class Reading:
    """What composing takes from the weights."""

    tree: Block  # with model.architecture filled in
    problems: list[Problem] = field(default_factory=list)
    # why architecture keys are missing has been said, or follows from another problem
    settled: bool = False


def read_architecture(tree: Block, draft: Block, loads: Mapping[str, str]) -> Reading:
    """`tree` with every unwritten key of model.architecture as the weights say it; written ones
    must agree with them.

    draft: the same tree, completed and resolved, which knows what `load` is.  loads: {key that
    names weights: role they are of}.
    """
    block = _architecture_block(tree)
    if block is None:  # something else stands there, which the schema will say
        return Reading(tree)
    written = {
        key: node for key, node in block.children.items() if key in FIELDS and not _is_missing(node)
    }
    sources, run_dir = _sources(tree, draft, loads), str(_value(draft, "run.dir"))
    found, problems = _read_all(sources, run_dir, network=False)
    # only now is the network worth its seconds
    if not found and not problems and not written.keys() >= REQUIRED:
        sources = _with_hub(sources, draft)
        found, problems = _read_all(sources, run_dir, network=True)
    if found:
        problems += [
            problem
            for other in found[1:]
            if (problem := _disagreement(found[0], other)) is not None
        ]
        problems += _contradictions(
            found[0], {key: _leaf(draft, f"{KEY}.{key}") for key in written}
        )
        values = {
            key: written.get(key, Leaf(value, found[0].path))
            for key, value in found[0].values.items()
        }
        return Reading(_replaced(tree, {**block.children, **values}), problems)
    if not problems and not written and loads and all(source.load != MISSING for source in sources):
        problems.append(_unsaid(sources))
    # Where somebody writes an architecture, what is left out has its default; a bare `???` of a
    # base recipe must not hide it.
    defaulted = set(FIELDS) - REQUIRED - written.keys() if written else set()
    kept = {key: node for key, node in block.children.items() if key not in defaulted}
    return Reading(_replaced(tree, kept), problems, settled=not written or bool(problems))


# -------------------------------------------------------------------------------------- in the tree


def _is_missing(node: Node | None) -> bool:
    return node is None or (isinstance(node, Leaf) and node.value == MISSING)


def _architecture_block(tree: Block) -> Block | None:
    """What is written below model.architecture; empty when nothing is, None when it is no block."""
    model = tree.children.get("model", Block({}, tree.origin))
    if not isinstance(model, Block):
        return None
    node = model.children.get("architecture")
    if isinstance(node, Block):
        return node
    return Block({}, model.origin) if _is_missing(node) else None


def _replaced(tree: Block, keys: Mapping[str, Node]) -> Block:
    model = tree.children.get("model", Block({}, tree.origin))
    block = _architecture_block(tree)
    assert isinstance(model, Block) and block is not None
    model = Block({**model.children, "architecture": Block(keys, block.origin)}, model.origin)
    return Block({**tree.children, "model": model}, tree.origin)


def _leaf(tree: Block, key: str) -> Leaf:
    node: Node | None = tree
    for part in key.split("."):
        node = node.children.get(part) if isinstance(node, Block) else None
    return node if isinstance(node, Leaf) else Leaf(MISSING, "")


def _value(tree: Block, key: str) -> Any:
    return _leaf(tree, key).value


def _sources(tree: Block, draft: Block, loads: Mapping[str, str]) -> list[Source]:
    """One for each folder that is loaded, named by the key that says the folder itself rather than
    `${models.actor.load}`."""
    sources: dict[str, Source] = {}
    for key in sorted(loads, key=lambda key: "${" in str(_value(tree, key))):
        leaf = _leaf(draft, key)
        load = leaf.value if isinstance(leaf.value, str) else MISSING
        sources.setdefault(load, Source(key, load, leaf.origin, loads[key]))
    return list(sources.values())


def _with_hub(sources: list[Source], draft: Block) -> list[Source]:
    hub = _leaf(draft, "model.hub")
    if (
        not hub.value
        or not isinstance(hub.value, str)
        or hub.value in [source.load for source in sources]
    ):
        return sources
    return [*sources, Source("model.hub", hub.value, hub.origin, "")]


# ------------------------------------------------------------------------------ on disk, on the hub


def _read_all(
    sources: Sequence[Source], run_dir: str, network: bool
) -> tuple[list[Found], list[Problem]]:
    found: list[Found] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            said = _read(source, run_dir, network)
        except UserError as error:
            problems.append(Problem(source.key, error.what, source.origin, error.fix))
        else:
            found += [] if said is None else [said]
    return found, problems


def _read(source: Source, run_dir: str, network: bool) -> Found | None:
    """None where nothing can be read: random weights, a stage that is not trained yet. Raises
    UserError for what cannot be read."""
    if source.load == MISSING:
        return None
    stored = stored_architecture(
        source.load,
        source.role,
        source.key,
        may_be_hub=may_be_hub(source.load, run_dir),
        network=network,
    )
    return None if stored is None else Found(source, stored.path, asdict(stored.architecture))


# ----------------------------------------------------------------------------------------- problems


def _same(a: Any, b: Any) -> bool:
    """Equal values; transformers wrote `type` for `rope_type` once, and some files have both."""
    return _scaling(a) == _scaling(b) if isinstance(a, dict) and isinstance(b, dict) else a == b


def _scaling(block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_type": block.get("type"),
        **{key: value for key, value in block.items() if key != "type"},
    }


def _disagreement(first: Found, other: Found) -> Problem | None:
    keys = [key for key in FIELDS if not _same(first.values[key], other.values[key])]
    if not keys:
        return None
    theirs = ", ".join(f"{key} {other.values[key]} ≠ {first.values[key]}" for key in keys)
    what = f"another architecture than {first.source.key}'s: {theirs} ({other.path} ≠ {first.path})"
    return Problem(
        other.source.key,
        what,
        other.source.origin,
        "all models of a run share one architecture: load weights of one kind",
    )


def _contradictions(found: Found, written: Mapping[str, Leaf]) -> list[Problem]:
    """One problem for each file that writes another architecture (or the command line), whatever
    the number of keys."""
    places: dict[str, list[str]] = {}
    for key, leaf in written.items():
        if leaf.value != MISSING and not _same(leaf.value, found.values[key]):
            places.setdefault(leaf.origin.rsplit(":", 1)[0], []).append(key)
    return [
        _contradiction(found, place, {key: written[key] for key in keys})
        for place, keys in places.items()
    ]


def _contradiction(found: Found, place: str, wrong: Mapping[str, Leaf]) -> Problem:
    theirs = ", ".join(f"{key} {leaf.value} ≠ {found.values[key]}" for key, leaf in wrong.items())
    first = next(iter(wrong.values())).origin
    if place == COMMAND_LINE:
        fix = "remove it: the architecture is read from the weights"
    else:
        fix = f"add with={FROM_WEIGHTS}: the architecture is then read from the weights"
    return Problem(
        KEY,
        f"another than that of the weights to load: {theirs} ({place} ≠ {found.path})",
        first,
        fix,
    )


def _unsaid(sources: Sequence[Source]) -> Problem:
    reasons = [
        (
            f"{s.key} is random"
            if s.load == "random"
            else f"{s.load!r} ({s.key}) is not on this machine"
        )
        for s in sources
    ]
    fix = (
        "add with=model/NAME (recipes/model/), which writes one, or load a Hugging Face folder or"
        f" a checkpoint: {sources[0].key}=DIR"
    )
    what = f"missing: it is not written, and no weights say it: {'; '.join(reasons)}"
    return Problem(KEY, what, sources[0].origin, fix, known=False)
