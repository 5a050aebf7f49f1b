"""Compare this environment's packages with the known vulnerabilities (pip-audit).

    python -m tools.vulnerabilities

Exit code 1: a package has one that ACCEPTED does not list. 0: none has, or no database can be
reached; then the line begins with "skipped" and has the reason. `make check` runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# id of a vulnerability -> why it does no harm here; an entry goes when a fixed version is installed
ACCEPTED: dict[str, str] = {}
OWN = "gipo-megatron"
SECONDS = 300


class Unreachable(Exception):
    """No database of vulnerabilities can be reached: the reason."""


def pins(installed: Mapping[str, str]) -> list[str]:
    """{name: version} -> NAME==VERSION; 2.13.0+cpu is 2.13.0 to the database."""
    others = {name: version for name, version in installed.items() if name.lower() != OWN}
    return sorted(f"{name}=={version.partition('+')[0]}" for name, version in others.items())


def pip_audit(packages: list[str]) -> list[dict[str, Any]]:
    """Return pip-audit's entry of each package. Raises Unreachable."""
    if find_spec("pip_audit") is None:
        raise Unreachable("the package pip-audit is not installed")
    with tempfile.TemporaryDirectory() as folder:
        listed, found = Path(folder, "packages.txt"), Path(folder, "found.json")
        listed.write_text("\n".join(packages), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        words = ["-m", "pip_audit", "-r", str(listed), *options, "--output", str(found)]
        try:
            done = subprocess.run(
                [sys.executable, *words],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(f"no answer of the database in {SECONDS} s") from None
        if not found.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise Unreachable(f"pip-audit failed: {last[:200]}")
        return json.loads(found.read_text(encoding="utf-8"))["dependencies"]


def audit(
    packages: list[str],
    look_up: Callable[[list[str]], list[dict[str, Any]]] = pip_audit,
    accepted: Mapping[str, str] = ACCEPTED,
) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print."""
    try:
        # one package first: a registry without the database takes a request for each of the others
        if not _known(look_up(["pip==23.0"])):
            raise Unreachable("the package registry here has no database of vulnerabilities")
        found = look_up(packages)
    except Unreachable as reason:
        return 0, [f"skipped: vulnerabilities of the packages: {reason}"]
    lines, bad = [], 0
    for entry in found:
        for each in entry.get("vulns", []):
            reason = next((accepted[i] for i in _ids(each) if i in accepted), "")
            fixed = ", ".join(each.get("fix_versions", [])) or "no version"
            verdict = f"accepted: {reason}" if reason else f"fixed in {fixed}"
            lines.append(f"{entry['name']} {entry['version']}: {each['id']}: {verdict}")
            bad += not reason
    unknown = [entry["name"] for entry in found if "vulns" not in entry]
    lines.append(
        f"vulnerabilities: {bad} in {len(_known(found))} packages"
        + (f"; not in the database: {', '.join(unknown)}" if unknown else "")
    )
    if bad:
        lines.append("  fix: raise the version in pyproject.toml, or list the id in ACCEPTED")
    return int(bad > 0), lines


def _known(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in found if "vulns" in entry]


def _ids(vulnerability: Mapping[str, Any]) -> list[str]:
    return [vulnerability["id"], *vulnerability.get("aliases", [])]


def main() -> int:
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    code, lines = audit(pins(installed))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
