"""The recipe's architecture: read from the weights to load, or written and compared with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.files import expand
from gipo_megatron.recipe.check import may_be_hub
from gipo_megatron.recipe.problems import Problem
from gipo_megatron.recipe.source import (
    COMMAND_LINE,
    MISSING,
    Block,
    Leaf,
    Node,
    Unknown,
    leaves,
    plain,
)
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.architecture import stored_architecture

KEY = "model.architecture"
FIELDS = tuple(f.name for f in dataclasses.fields(Architecture))
REQUIRED = tuple(
    f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING
)
FROM_WEIGHTS = "model/from_weights"  # the fragment that removes a written architecture


@dataclass(frozen=True)
class Source:
    """A recipe key that names weights."""

    key: str  # models.actor.load
    load: str
    origin: str
    role: str  # whose weights they are; empty for model.hub


@dataclass(frozen=True)
class Found:
    """An architecture read from weights."""

    source: Source
    path: str  # the file that describes it
    values: dict[str, Any]


def read_architecture(tree: Block, loads: Mapping[str, str], problems: list[Problem]) -> Block:
    """Return `tree` with model.architecture from the weights; keys that are written must agree.

    tree: merged and resolved.  loads: {key that names weights: role they are loaded as}.
    """
    block = _written_block(tree)
    if block is None:  # something else is written there, which validation reports
        return tree
    written = {
        key: node
        for key, node in block.children.items()
        if not (key in FIELDS and isinstance(node, Leaf) and node.value == MISSING)
    }
    complete = set(REQUIRED) <= written.keys()
    sources, before = _sources(tree, loads), len(problems)
    found = _read_all(sources, tree, network=False, problems=problems)
    if not found and len(problems) == before and not complete:
        sources += _hub(tree, sources)
        found = _read_all(sources, tree, network=True, problems=problems)
    if found:
        first = found[0]
        problems += _disagreements(found) + _contradictions(first, written)
        values = {key: Leaf(value, first.path) for key, value in first.values.items()}
        return _with_architecture(tree, Block({**values, **written}, block.origin))
    silent = len(problems) == before and loads and not written
    if silent and all(source.load != MISSING for source in sources):
        problems.append(_unreadable(sources))
    unknown = Leaf(Unknown("not set, and no weights to read it from"), block.origin)
    missing = {} if written else dict.fromkeys(REQUIRED, unknown)
    return _with_architecture(tree, Block({**written, **missing}, block.origin))


# ------------------------------------------------------------------------------------- in the tree


def _written_block(tree: Block) -> Block | None:
    """The keys below model.architecture; an empty block where there are none, None for what is no
    block."""
    model = tree.children.get("model", Block({}, tree.origin))
    if not isinstance(model, Block):
        return None
    node = model.children.get("architecture", Leaf(MISSING, model.origin))
    if isinstance(node, Block):
        return node
    return Block({}, model.origin) if node.value == MISSING else None


def _with_architecture(tree: Block, architecture: Block) -> Block:
    model = tree.children.get("model", Block({}, tree.origin))
    assert isinstance(model, Block)
    model = Block({**model.children, "architecture": architecture}, model.origin)
    return Block({**tree.children, "model": model}, tree.origin)


def _sources(tree: Block, loads: Mapping[str, str]) -> list[Source]:
    """One source for each folder that is loaded, in the recipe's order of keys."""
    sources: dict[str, Source] = {}
    written = [".".join(path) for path, _ in leaves(tree)]
    for key in (*(key for key in written if key in loads), *(loads.keys() - {*written})):
        load = tree.value(key)
        load = load if isinstance(load, str) else MISSING
        sources.setdefault(load, Source(key, load, tree.origin_of(key), loads[key]))
    return list(sources.values())


def _hub(tree: Block, sources: Sequence[Source]) -> list[Source]:
    """model.hub, where no role loads it."""
    hub = tree.value("model.hub")
    if not isinstance(hub, str) or hub in ("", MISSING, *(s.load for s in sources)):
        return []
    return [Source("model.hub", hub, tree.origin_of("model.hub"), "")]


def _read_all(
    sources: Sequence[Source], tree: Block, network: bool, problems: list[Problem]
) -> list[Found]:
    found, run_dir = [], str(tree.value("run.dir"))
    for s in sources:
        if s.load == MISSING:
            continue
        hub = may_be_hub(s.load, run_dir)
        try:
            load = expand(s.load, s.key)  # not typed yet
            stored = stored_architecture(load, s.role, s.key, may_be_hub=hub, network=network)
        except UserError as error:
            file = f"{error.where}: " if error.where not in ("", s.key) else ""
            problems.append(Problem(s.key, f"{file}{error.what}", s.origin, error.fix))
            continue
        if stored is not None:
            found.append(Found(s, stored.path, asdict(stored.architecture)))
    return found


# ---------------------------------------------------------------------------------------- problems


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal; older transformers wrote `type` for `rope_type`."""
    return _scaling(a) == _scaling(b) if isinstance(a, dict) and isinstance(b, dict) else a == b


def _scaling(block: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in block.items() if key != "type"}
    return {"rope_type": block.get("type"), **rest}


def _disagreements(found: Sequence[Found]) -> list[Problem]:
    """One problem for each later weights with another architecture than the first."""
    first, problems = found[0], []
    for other in found[1:]:
        keys = [key for key in FIELDS if not _same(first.values[key], other.values[key])]
        if keys:
            theirs = ", ".join(f"{key} {other.values[key]} ≠ {first.values[key]}" for key in keys)
            what = f"another architecture than {first.source.key}'s: {theirs}"
            what += f" ({other.path} ≠ {first.path})"
            fix = "all models of a run share one architecture: load weights of one kind"
            problems.append(Problem(other.source.key, what, other.source.origin, fix))
    return problems


def _contradictions(found: Found, written: Mapping[str, Node]) -> list[Problem]:
    """One problem for each file that writes another architecture, or the command line."""
    places: dict[str, list[str]] = {}
    origins: dict[str, str] = {}
    for key, node in written.items():
        value = plain(node)
        if key in FIELDS and not isinstance(value, Unknown) and not _same(value, found.values[key]):
            place = node.origin.rsplit(":", 1)[0]
            places.setdefault(place, []).append(f"{key} {value} ≠ {found.values[key]}")
            origins.setdefault(place, node.origin)
    problems = []
    for place, differ in places.items():
        what = "another than that of the weights to load: "
        what += f"{', '.join(differ)} ({place} ≠ {found.path})"
        fix = "the architecture is then read from the weights"
        fix = f"remove it: {fix}" if place == COMMAND_LINE else f"add with={FROM_WEIGHTS}: {fix}"
        problems.append(Problem(KEY, what, origins[place], fix))
    return problems


def _unreadable(sources: Sequence[Source]) -> Problem:
    reasons = [
        f"{s.key} is random"
        if s.load == "random"
        else f"{s.load!r} ({s.key}) is not on this machine"
        for s in sources
    ]
    what = f"not set, and cannot be read from any weights: {'; '.join(reasons)}"
    fix = "add with=model/NAME (recipes/model/), which writes one, or load a Hugging Face folder or"
    fix += f" a checkpoint: {sources[0].key}=DIR"
    return Problem(KEY, what, sources[0].origin, fix, absent=True)
