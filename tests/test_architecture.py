"""The house rules that a machine can check: who imports whom, and how long things are."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gipo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted([*MODULES, *(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py")])

# The rooms (folders and single files of the package), floor by floor: a room imports rooms of lower
# floors only.
FLOORS = [
    {"environment", "errors", "http_client", "screen", "statistics", "tensors", "web"},
    {"capabilities", "files", "launcher", "metrics", "ops", "specs"},
    {"registry", "types"},
    {"data", "roles", "rollouts", "typed"},
    {"components", "local", "serving", "telemetry", "weights"},
    {"algorithms", "megatron", "reports"},
    {"conversion", "recipe"},
    {"cli", "planning", "training"},
    {"evaluation"},
    {"commands"},
]
# a never imports b, whatever their floors: each is for one audience
APART = [
    ("weights", "megatron"),
    ("reports", "megatron"),
    ("conversion", "recipe"),
    ("telemetry", "recipe"),
    ("components", "data"),
    ("algorithms", "data"),
    ("megatron", "recipe"),
    ("megatron", "data"),
]
# in lower case, gipo is the name of the project and of its command
NAMES = re.compile(r"(?<![a-zA-Z])((?i:ppo|dpo|rloo|grpo)|GIPO)(?![a-zA-Z])")


def room(module: str) -> str:
    """gipo_megatron.data.sources -> data."""
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Names of the modules that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            found += inner if module == "gipo_megatron" else [module]
    return found


def arrows() -> set[tuple[str, str]]:
    """(room, room it imports)."""
    found = set()
    for path in MODULES:
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        targets = {room(name) for name in imports(path) if name.startswith("gipo_megatron.")}
        found |= {(own, target) for target in targets - {own}}
    return found


def test_rooms_import_lower_floors_only() -> None:
    """Ten floors, no arrow up, so no cycle."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    found = arrows()
    unknown = {name for arrow in found for name in arrow} - floor.keys()
    assert not unknown, f"on no floor: {unknown}; add them to FLOORS, and think where they belong"
    assert len(FLOORS) <= 10 and len(found) > 60
    assert not [f"{a} imports {b}" for a, b in sorted(found) if floor[a] <= floor[b]]
    assert not [f"{a} imports {b}" for a, b in APART if (a, b) in found]


def test_megatron_is_imported_in_one_folder_only() -> None:
    users = {
        path for path in CODE if any(name.split(".")[0] == "megatron" for name in imports(path))
    }
    assert users, "no file imports megatron: the check is broken"
    assert all(path.is_relative_to(PACKAGE / "megatron") for path in users), users


def code_words(path: Path) -> list[tuple[int, str]]:
    """(line, text) of a file's identifiers and strings, docstrings left out."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        (token.start[0], token.string)
        for token in tokens
        if token.type == tokenize.NAME
        or (token.type == tokenize.STRING and token.start[0] not in docstrings)
    ]


def test_an_algorithms_name_stands_on_its_page_only() -> None:
    """An algorithm is a page, its recipes and its tests: no other module names it in code.

    Advantage components carry the names of what they estimate.
    """
    own = {PACKAGE / "components" / "advantage.py", *(PACKAGE / "algorithms").glob("*.py")}
    others = [path for path in MODULES if path not in own]
    named = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in others
        for line, word in code_words(path)
        if NAMES.search(word)
    ]
    assert len(others) > 100
    assert not named


def test_sizes_are_a_ratchet() -> None:
    """At 100 columns (ruff's line-length): the package has at most 30,760 lines, a file at most
    400, p95 300; a function at most 60, p95 28 (docstrings counted)."""
    assert "line-length = 100\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    files = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    functions = {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(files) > 40 and len(functions) > 300

    def p95(values: dict) -> int:
        return sorted(values.values())[int(0.95 * (len(values) - 1))]

    too_long = {str(k): v for k, v in files.items() if v > 400}
    too_long |= {k: v for k, v in functions.items() if v > 60}
    assert not too_long
    assert p95(files) <= 300 and p95(functions) <= 28
    assert sum(files[path] for path in MODULES) <= 30_760


def test_no_path_of_a_machine_is_committed() -> None:
    """Sources name no home, no temporary folder of the machine they were written on."""
    checked = 0
    for path in [
        *CODE,
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").rglob("*.yaml"),
        *(ROOT / "launch").glob("*"),
    ]:
        text = path.read_text(encoding="utf-8")
        checked += 1
        for folder in ("work", "farm", "root", "home"):
            assert f"/{folder}/" not in text, f"{path} names /{folder}/"
    assert checked > 60
