"""Recipes: keys and values that no recipe has, YAML that is none, includes, words of the command
line."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

import yaml
from hypothesis import strategies as st

from gipo_megatron.commands import RECIPES
from gipo_megatron.commands.recipe import composed
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.files import Files, recipe_names
from gipo_megatron.recipe.source import dump_value, plain
from tools.fuzzing.case import Case, global_state
from tools.fuzzing.values import damaged, hostile, mutated

FILE = "fuzz.yaml"
# text of a value in the file, which a reader of YAML may take for something else
RAW = [
    "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary x", "!!binary aGk=",
    "!!python/object/apply:os.getcwd []", "!!set {a, b}", "!!omap [a: 1]", "!!null x", "!local x",
    "!!str 1", "!!map [a]", "!!seq {a: 1}", "&a [*a]", "&a {b: *a}", "&a x", "*nowhere",
    "[" * 60 + "1" + "]" * 60, "[" * 3000, "{a: " * 300 + "1" + "}" * 300, "{a: 1, a: 2}",
    "9" * 5000, "1e999", "-1e999", ".inf", "-.inf", ".nan", "0x10", "0o7", "1_000", "1__0", "_1",
    "+", "1e", "1e-400", "'unclosed", '"\\ud800"', '"\\x1b[2J"', '"\\0"', '"a\\nb"', "|\n    text",
    ">\n    a\n    b", "? a", "- a", "- - - a", "@x", "`", "%x", "{<<: {a: 1}}", "2001-01-01",
    "yes", "off", "\t", "a: b: c", "#", "~", "[a, b", "{a", "]", "${", "${}", "${.}", "${..seed}",
    "${run}", "${run.dir}", "${oc.env:HOME}", "${oc.env:NOPE_NOPE}", "${oc.decode:x}",
    "${oc.create:[1]}", "${a.b.c}", "${models}", "${nope:1}", "${${run.dir}}", "${run.steps}",
    '"${" ', "'${data.path}${data.path}'", "[${run.seed}, '${run.seed}']", "{a: '${run.seed}'}",
    "'" + "${" * 200 + "'", "${oc.dict.keys:models}", "${oc.select:run.seed}", "${data.${run.dir}}",
]  # fmt: skip
DEFAULTS: list[Any] = [
    "base/gipo", ["nowhere"], [""], ["."], [".."], ["/"], ["./"], ["x" * 300], ["a/" * 3000],
    ["a\0b"], [FILE], ["./fuzz"], ["other"], ["../x"], [1], [None], [["a"]], {}, None, "", [],
    ["~no-such-user/x"], ["~"], ["folder.yaml"], ["base/gipo", "base/gipo"], ["tiny/sft", FILE],
    ["./other", "./other"], ["\u202e"], ["base/../base/gipo"],
]  # fmt: skip
OTHERS: list[bytes] = [
    b"defaults: [./fuzz]\n", b"run: {steps: 3}\n", b"- a\n", b"\xff\n", b"", b"run: 3\n",
    b"defaults: [./other]\n", b"models: {actor: {lr: x}}\n", b"a: &a 1\nb: *a\n",
]  # fmt: skip
WORDS = [
    "world=0", "world=3", "world=\u00b2", "world=" + "9" * 5000, "world=-1", "world=1e3", "world=",
    "world=999999999999", "with=", "with=,", "with=nowhere", "with=model/tiny,hardware/cpu",
    "with=model/tiny", "with=.", "with=" + "x" * 300, "=", "a=", "=a", ".=1", "a..b=1", "-x=1",
    "run=", "run=3", "run.dir=", "run.dir=/dev/null/x", "models=[]", "models.actor=3", "data=null",
    "algorithm=nope", "algorithm.name=", "batch=[1,2]", "run.steps=[", "run.steps={a: 1}",
    "run.steps='", "run.steps=#", "run.steps= 3 ", "run.steps=\ud800", "plugins=[os.path]",
    "plugins=[nope]", "plugins=[1]", "plugins=x", "plugins=['']", "plugins=['.']", "recipe=a",
    "data.path=" + "x" * 5000, "models.actor.load=" + "x" * 300, "models.actor.load=a/b",
    "models.actor.load=.", "models.actor.load=" + FILE, "run.steps=!!int x", "a=&b [*b]",
    "data.template={{", "data.part=1/0", "data.part=1/" + "9" * 99, "x" * 5000 + "=1",
    "data.columns={a: {b: 1}}", "models.reward_x.load=random", "models.actor.lr=1e999",
]  # fmt: skip


@functools.cache
def shipped() -> list[str]:
    """Return the recipes that are complete without weights on this machine."""
    names = []
    for name in recipe_names(RECIPES):
        with contextlib.suppress(UserError), global_state():
            composed(name, ())
            names.append(name)
    return names


@functools.cache
def expanded(name: str) -> Any:
    """Return a shipped recipe with its defaults, as plain values."""
    return plain(Files(RECIPES).load(RECIPES / f"{name}.yaml"))


class Raw(str):
    """YAML text that stands for a value."""


def emit(value: dict[Any, Any], indent: int = 0) -> str:
    """Return YAML, a line for each key; values of Raw unchanged."""
    lines = []
    for key, child in value.items():
        name = f"{' ' * indent}{_key(key)}:"
        if isinstance(child, dict) and child and indent < 60:
            lines += [name, emit(child, indent + 2)]
        else:
            lines.append(f"{name} {child if isinstance(child, Raw) else _value(child)}")
    return "\n".join(lines)


def _key(key: Any) -> str:
    text = str(key)
    return text if text.replace("_", "").isalnum() else json.dumps(text)


def _value(value: Any) -> str:
    try:
        return dump_value(value)
    except (RecursionError, yaml.YAMLError):  # too deep, or Raw in a list
        return "[[]]"


def command(draw: st.DrawFn, name: str = FILE) -> tuple[str, ...]:
    verb = draw(st.sampled_from(["check"] * 6 + ["show", "diff", "plan"]))
    if verb == "plan":
        return "plan", f"recipe={name}"
    other = draw(st.sampled_from(["tiny/sft", name])) if verb == "diff" else ""
    return tuple(word for word in ("recipe", verb, name, other) if word)


def names_of(keys: list[str], *more: str) -> tuple[str, ...]:
    """Return what an error may name: a key, the file, the command line."""
    return (*(key for key in keys if key and key.isprintable()), FILE, "command line", *more)


@st.composite
def trees(draw: st.DrawFn) -> Case:
    """A whole recipe with a few keys changed."""
    tree = expanded(draw(st.sampled_from(shipped())))
    bad = st.one_of(hostile(), hostile(), st.sampled_from(RAW).map(Raw))
    tree, keys = draw(mutated(tree, bad=bad))
    return Case(command(draw), {FILE: emit(tree).encode("utf-8", "replace")}, names_of(keys))


@st.composite
def texts(draw: st.DrawFn) -> Case:
    """A whole recipe whose text is damaged."""
    text = emit(expanded(draw(st.sampled_from(shipped())))).encode()
    return Case(command(draw), {FILE: draw(damaged(text))}, names_of([], "recipe", "model", "run"))


@st.composite
def includes(draw: st.DrawFn) -> Case:
    """A short recipe on others."""
    defaults = draw(st.sampled_from(DEFAULTS))
    text = f"defaults: {dump_value(defaults)}\nrun: {{steps: 2, dir: runs/x}}\n"
    files = {FILE: text.encode(), "other.yaml": draw(st.sampled_from(OTHERS)), "folder.yaml/x": b""}
    return Case(command(draw), files, names_of(["defaults", "other.yaml"], "recipes/"))


@st.composite
def words(draw: st.DrawFn) -> Case:
    """A shipped recipe with words of the command line."""
    name = draw(st.sampled_from(shipped()))
    more = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=2))
    drawn = draw(st.one_of(st.none(), st.tuples(_keys(name), hostile() | st.sampled_from(RAW))))
    keys = [word.partition("=")[0].split(".")[-1] for word in more]
    if drawn is not None:
        value = drawn[1] if isinstance(drawn[1], str) else _value(drawn[1])
        more.append(f"{drawn[0]}={value}")
        keys += drawn[0].split(".")
    more = [word for word in more if "\0" not in word]  # no word of a command line has it
    return Case((*command(draw, name), *more), {}, names_of(keys, *more, name, "recipes/"))


def _keys(name: str) -> st.SearchStrategy[str]:
    """Dotted keys of a shipped recipe."""
    found: list[str] = []

    def walk(value: dict[str, Any], before: str) -> None:
        for key, child in value.items():
            found.append(f"{before}{key}")
            if isinstance(child, dict):
                walk(child, f"{before}{key}.")

    walk(expanded(name), "")
    return st.sampled_from(found)


CASES = st.one_of(trees(), trees(), trees(), texts(), includes(), words(), words())
