"""tools/vulnerabilities.py with reports of pip-audit written by hand; no test uses a network."""

from __future__ import annotations

from typing import Any

import pytest

from tools.vulnerabilities import Unreachable, audit, pins

CLEAN = {"name": "a", "version": "1", "vulns": []}
HOLED = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": ["CVE-1"]}],
}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}
PROBED = {"name": "pip", "version": "23.0", "vulns": []}


def answers(*given: list[dict[str, Any]] | Unreachable) -> Any:
    rest = iter(given)

    def look_up(packages: list[str]) -> list[dict[str, Any]]:
        answer = next(rest)
        if isinstance(answer, Unreachable):
            raise answer
        return answer

    return look_up


def test_versions_as_the_database_has_them() -> None:
    installed = {"torch": "2.13.0+cpu", "gipo-megatron": "0.1.0", "a": "1"}
    assert pins(installed) == ["a==1", "torch==2.13.0"]


@pytest.mark.parametrize(
    ("found", "accepted", "code", "lines"),
    [
        ([CLEAN], {}, 0, ["vulnerabilities: 0 in 1 packages"]),
        ([CLEAN, UNKNOWN], {}, 0, ["vulnerabilities: 0 in 1 packages; not in the database: c"]),
        (
            [CLEAN, HOLED],
            {},
            1,
            [
                "b 2: PYSEC-1: fixed in 2.1",
                "vulnerabilities: 1 in 2 packages",
                "  fix: raise the version in pyproject.toml, or list the id in ACCEPTED",
            ],
        ),
        (
            [HOLED],
            {"CVE-1": "not called"},
            0,
            ["b 2: PYSEC-1: accepted: not called", "vulnerabilities: 0 in 1 packages"],
        ),
    ],
)
def test_what_is_found(
    found: list[dict[str, Any]], accepted: dict[str, str], code: int, lines: list[str]
) -> None:
    assert audit(["a==1"], answers([PROBED], found), accepted) == (code, lines)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([Unreachable("the package pip-audit is not installed")], "is not installed"),
        ([[UNKNOWN]], "the package registry here has no database of vulnerabilities"),
        ([[PROBED], Unreachable("no answer of the database in 300 s")], "in 300 s"),
    ],
)
def test_without_a_database_there_is_no_verdict(given: list[Any], why: str) -> None:
    code, (line,) = audit(["a==1"], answers(*given))
    assert code == 0 and line.startswith("skipped: ") and line.endswith(why)
