"""docs/metrics.md names every metric that the code logs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.algorithms.test_ppo import gipo
from tests.small_ppo import SOURCES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gipo_megatron"
TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
FAMILIES = "rollout|reward|kl|groups|source|weights|eval|perf|memory|time|sft|rm|dpo|policy|value"
INTERNAL = {"perf/tokens"}  # summed over replicas, then removed from the row
READ_ONLY = {"rollout/repetition"}  # an alert's other name for 1 - rollout/distinct


def documented() -> list[re.Pattern[str]]:
    """One pattern for each `name` of a table's first column; `<g>` stands for any word."""
    rows = re.findall(r"^\| (`[^|]*) \|", TEXT, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 80
    return [re.compile(re.sub(r"<\w+>", r"[^/]+", name)) for name in names]


def written(path: Path) -> set[str]:
    """The metric names among a module's strings; `*` for what an f-string fills in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
            found.add("".join(map(str, parts)))
    return {
        text
        for text in found
        if re.fullmatch(rf"(?:{FAMILIES})/(?:[\w*/]*[a-z0-9]|\w+[_/]\*)", text)
    }


def test_every_name_in_the_code_is_documented() -> None:
    folders = ("algorithms", "components", "training", "telemetry", "megatron")
    modules = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    names = set().union(*(written(path) for path in [*modules, *PACKAGE.glob("*.py")]))
    assert len(names) > 50
    known = documented()
    missing = {
        n
        for n in names - INTERNAL - READ_ONLY
        if not any(pattern.fullmatch(n) for pattern in known)
    }
    assert not missing


def test_every_name_of_a_step_is_documented() -> None:
    names = gipo().step(0).metrics.keys()
    assert len(names) > 50 and all(f"source/{source}/kl" in names for source in SOURCES)
    known = documented()
    assert not {name for name in names if not any(pattern.fullmatch(name) for pattern in known)}
