"""The house rules that a machine can check: who imports whom, and how long things are."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gipo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted([*MODULES, *(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py")])

# layer -> what it may import of this package (itself always)
LOW = {"types", "specs", "errors", "files", "environment", "capabilities", "metrics", "statistics"}
LOW |= {"ops", "roles"}
MAY_IMPORT = {
    "metrics": set(),
    "types": {"metrics"},
    "specs": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "environment": set(),
    "capabilities": {"errors"},
    "statistics": set(),
    "roles": {"types", "specs"},
    "ops": set(),
    "recipe.registry": {"specs"},
    "weights": LOW | {"data"},
    "components": LOW | {"recipe.registry"},
    "local": LOW,
    "algorithms": LOW | {"recipe.registry", "components"},
    "megatron": LOW | {"weights"},
    "data": LOW,
    "telemetry": LOW,
    "reports": LOW | {"telemetry"},
    "recipe": LOW | {"recipe.registry", "components", "algorithms", "weights", "data", "telemetry"},
    "planning": LOW | {"recipe.registry", "recipe", "megatron", "telemetry"},
    "conversion": LOW | {"megatron", "data", "weights", "telemetry"},
    "training": LOW
    | {"recipe.registry", "recipe", "algorithms", "megatron", "weights"}
    | {"data", "telemetry", "reports", "conversion"},
    "cli": {"errors", "environment", "recipe"},
    "commands": LOW
    | {"telemetry"}
    | {"recipe", "data", "megatron", "conversion", "reports", "training", "evaluation", "planning"},
    "evaluation": LOW
    | {"recipe.registry", "recipe", "components", "megatron", "weights", "data", "telemetry"}
    | {"reports", "conversion", "training"},
}


def layer(module: str) -> str:
    """gipo_megatron.recipe.registry -> recipe.registry; gipo_megatron.data.sources -> data."""
    parts = module.split(".")[1:]
    return "recipe.registry" if parts[:2] == ["recipe", "registry"] else parts[0]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            found += (
                [f"{module}.{alias.name}" for alias in node.names]
                if module in ("gipo_megatron", "gipo_megatron.recipe")
                else [module]
            )
    return found


def test_lower_layers_never_import_upper_ones() -> None:
    checked = 0
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        own = layer(module)
        assert own in MAY_IMPORT, (
            f"{path.name} belongs to no layer: add it to MAY_IMPORT, and think where it sits"
        )
        for name in imports(path):
            if name.startswith("gipo_megatron."):
                target = layer(name)
                assert target == own or target in MAY_IMPORT[own], (
                    f"{module} ({own}) imports {name} ({target})"
                )
                checked += 1
    assert checked > 100


def test_megatron_is_imported_in_one_folder_only() -> None:
    users = {
        path for path in CODE if any(name.split(".")[0] == "megatron" for name in imports(path))
    }
    assert users, "nobody imports megatron: the check is broken"
    assert all(path.is_relative_to(PACKAGE / "megatron") for path in users), users


def test_sizes_are_a_ratchet() -> None:
    """A file has at most 400 lines, p95 250; a function at most 80, p95 40 (docstrings counted)."""
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

    too_long = {str(k): v for k, v in files.items() if v > 400} | {
        k: v for k, v in functions.items() if v > 80
    }
    assert not too_long
    assert p95(functions) <= 40
    assert p95(files) <= 300


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
