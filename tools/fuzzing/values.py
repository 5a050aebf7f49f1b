"""Values that no key expects, and damage to JSON values and to text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 2.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "a", "0", "-1", "1e5", "true", "null", "NaN", "text", "\0", "a\0b", "\ud800",
    "\u202e", "\N{PILE OF POO}", "é\u2028", "\x1b[2J", "a\nb", "x" * 300, "word " * 4000,
    "../../x", "/", ".", "..", "/dev/null", "~", "~no-such-user", "${x}", "${", "???", "{{ 1/0 }}",
]  # fmt: skip
BLOCKS: list[Any] = [[], {}, [[]], [None], [1, "a"], {"": None}, {"a": 1}, {"a": {"b": []}}]
DEEP = [nested(60), nested(300)]


def hostile() -> st.SearchStrategy[Any]:
    """Any of the values above, or a small one drawn."""
    drawn = st.one_of(
        st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
    )
    listed = [st.sampled_from(values) for values in (SCALARS, SCALARS, BLOCKS, DEEP)]
    return st.one_of(*listed, drawn)


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every key and item."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        yield (*path, key)
        yield from paths(child, (*path, key))


def replaced(value: Any, path: Path, change: Callable[[Any, Any], list[tuple[Any, Any]]]) -> Any:
    """Return a copy in which `change(key, child)` stands for the item at `path`."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    result: list[tuple[Any, Any]] = []
    for key, child in pairs:
        if key != path[0]:
            result.append((key, child))
        elif len(path) == 1:
            result += change(key, child)
        else:
            result.append((key, replaced(child, path[1:], change)))
    return dict(result) if isinstance(value, dict) else [child for _, child in result]


def alike(value: Any, place: int) -> Any:
    """Return another value of the same type."""
    same = [other for other in SCALARS if type(other) is type(value)] or SCALARS
    return same[place % len(same)]


@st.composite
def mutated(
    draw: st.DrawFn, value: Any, most: int = 3, bad: st.SearchStrategy[Any] | None = None
) -> tuple[Any, list[str]]:
    """Draw `value` with one to `most` changes: the new value, the keys at fault."""
    keys: list[str] = []
    values = hostile() if bad is None else bad
    for _ in range(draw(st.sampled_from([1, 1, 1, *range(2, most + 1)]))):
        places = list(paths(value))
        if not places:
            break
        path = draw(st.sampled_from(places))
        ways = ["alike", "alike", "alike", "retype", "retype", "delete", "misspell", "nest"]
        what = draw(st.sampled_from(ways))
        new = draw(values) if what == "retype" else None
        place = draw(st.integers(0, len(SCALARS) - 1))
        changes: dict[str, Callable[[Any, Any], list[tuple[Any, Any]]]] = {
            "alike": lambda key, child, place=place: [(key, alike(child, place))],
            "retype": lambda key, child, new=new: [(key, new)],
            "delete": lambda key, child: [],
            "misspell": lambda key, child: [(f"{key}x", child)],
            "nest": lambda key, child: [(key, {"x": child})],
        }
        value = replaced(value, path, changes[what])
        keys += [str(part) for part in path]
    return value, keys


def as_json(value: Any) -> bytes:
    """Return JSON with NaN, Infinity and lone surrogates as Python writes them."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file's content with its bytes damaged."""
    size = len(content)
    place = draw(st.integers(0, max(size - 1, 0)))
    more = draw(st.sampled_from(MORE))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:place],
        lambda: content[:place] + more + content[place:],
        lambda: content[:place] + more + content[place + len(more) :],
        lambda: content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :],
        lambda: content + more,
        lambda: more + content,
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: content + content,
        lambda: more,
        lambda: b"",
    ]
    return draw(st.sampled_from(ways if size else ways[-2:]))()


MORE = [
    b"\xff", b"\0", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\t", b" ", b"{", b"}", b"[", b"]",
    b",", b":", b'"', b"'", b"\\", b"\\ud800", b"9" * 5000, b"1e999", b"-", b"NaN", b"#", b"&a ",
    b"*a", b"!!int x", b"!x", b"%", b"\x1b[2J", b"[" * 3000, b'{"a":' * 3000, b"\x80" * 9,
    b"\r", b"\xe2\x80\xa8", POINTER, b"x" * 70_000,
]  # fmt: skip
