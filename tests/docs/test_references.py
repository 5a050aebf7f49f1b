"""References to documents resolve: every named .md file exists, and so does every section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".sh", ".sbatch", ".toml"}
FOLDERS = ("gipo_megatron", "tools", "launch", "tests", "examples", "recipes", "docs")
WRITTEN = {"table.md", "index.md"}  # by an evaluation; by mkdocs, from the README
SECTION = re.compile(
    r"\b(?:docs/)?([\w-]+)\.md,? (?:sections? )?(\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)*)"
)


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [*found, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    return sorted(path for path in files if path.suffix in SUFFIXES and path.is_file())


def words(path: Path) -> str:
    """The text in one line, without the marks that begin lines of comments."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"\s*\n[ \t]*(?:#(?!#)[ \t]*)?", " ", text)


def sections(document: Path) -> set[str]:
    """`2` for a heading `## 2. …`, `2.1` for `### 2.1 …` and for item 1 of a list in section 2."""
    found, current = set(), ""
    for line in document.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ (\d+(?:\.\d+)?)\.? ", line):
            current = heading[1]
            found.add(current)
        elif item := re.match(r"(\d+)\. ", line):
            found.add(f"{current}.{item[1]}")
    return found


def test_sections_are_those_of_the_algorithm() -> None:
    found = sections(ROOT / "docs" / "algorithm.md")
    assert {"1", "2", "2.1", "2.2", "2.3", "3", "5.14", "9"} <= found and "2.4" not in found


def test_every_section_that_is_named_exists() -> None:
    checked, missing = 0, []
    for path in sources():
        for name, numbers in SECTION.findall(words(path)):
            document = ROOT / "docs" / f"{name}.md"
            known = sections(document) if document.is_file() else set()
            for number in re.split(r", | and ", numbers):
                checked += 1
                if number not in known:
                    missing.append(f"{path.relative_to(ROOT)}: {name}.md {number}")
    assert checked > 25 and not missing


def test_every_document_that_is_named_exists() -> None:
    checked, missing = 0, []
    for path in sources():
        for name in re.findall(r"(?<![\w/-])(?:docs/)?([\w-]+\.md)\b", words(path)):
            checked += 1
            page = name.replace("_tables", "")  # of a study, which writes its tables
            if name not in WRITTEN and not any(
                (folder / name).is_file() or (folder / page).is_file()
                for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "studies", path.parent)
            ):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert checked > 50 and not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_links_of_a_page_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_a_hundred_lines_of_a_hundred_columns() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
