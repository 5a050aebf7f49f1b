"""pyproject.toml declares what is imported: the code's dependencies, and those of the tests."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# runs in the environment of vLLM's server, on the packages of that
ELSEWHERE = ROOT / "gipo_megatron" / "serving" / "plugin"
OWN = {"gipo_megatron", "tools", "launch", "tests", "examples"}
# Declared, and imported by another package that does not declare it.
INDIRECT = {
    "einops": "megatron-core",
    "tensorboard": "torch.utils.tensorboard",
    "tabulate": "pandas.DataFrame.to_markdown",
}
TOOLS = {
    *("ruff", "mypy", "types-pyyaml", "pre-commit", "pytest-timeout", "pytest-xdist"),
    "pip-audit",
    *("mkdocs-material", "mkdocstrings", "gipo-megatron"),
}
# Packages whose distribution has another name, where they may be missing on this machine.
DISTRIBUTIONS = {"transformer_engine": "transformer-engine", "apex": "apex"}


def names(requirements: list[str]) -> set[str]:
    """`PyYAML>=6` -> pyyaml, as PEP 503 compares names."""
    found = [re.match(r"[A-Za-z0-9._-]+", text) for text in requirements]
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def imported(*folders: str) -> Iterator[str]:
    """The top-level modules that these folders import, but for the standard library and our own."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ELSEWHERE):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    modules = [node.module]
                for module in modules:
                    top = module.partition(".")[0]
                    if top not in OWN and top not in sys.stdlib_module_names:
                        yield top


def distributions(modules: Iterator[str]) -> set[str]:
    installed = metadata.packages_distributions()
    found = set(modules)
    unknown = found - installed.keys() - DISTRIBUTIONS.keys()
    assert not unknown, f"no installed package holds {sorted(unknown)}"
    return names([DISTRIBUTIONS.get(top) or installed[top][0] for top in found])


def test_what_the_code_imports_is_declared_and_nothing_else() -> None:
    declared = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    used = distributions(imported("gipo_megatron", "launch", "examples"))
    assert len(used) > 12 and used - declared <= names(extras["gpu"])
    used |= distributions(imported("tools"))  # a benchmark compares with TRL; fuzzing is for tests
    assert used - declared <= names(extras["gpu"]) | names(extras["trl"]) | {"hypothesis"}
    assert declared - used <= INDIRECT.keys()


def test_what_the_tests_import_is_declared_and_nothing_else() -> None:
    declared = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    dev = names(extras["dev"]) | names(extras["trl"])
    used = distributions(imported("tests"))
    assert len(used) > 10 and used <= declared | dev | names(extras["gpu"])
    assert dev - used <= TOOLS
