"""Hooks of mkdocs (the README is the first page; links out of docs/ become plain text) and of
mkdocstrings (a docstring is plain text with formulas and shapes, not Markdown)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Any, config: Any) -> Any:
    """Add index.md: the README, with its links to docs/ made relative to the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Keep links to pages, anchors, pictures and addresses; of others, keep the words."""

    def kept(match: re.Match[str]) -> str:
        words, target = match[1], match[2].partition("#")[0]
        known = target.endswith((".md", ".svg")) and (ROOT / "docs" / target).exists()
        return match[0] if not target or known or "://" in target else words

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", kept, markdown)


class PlainDocstrings(griffe.Extension):
    """The first paragraph becomes text, and what follows keeps its line breaks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            first, _, rest = obj.docstring.value.strip().partition("\n\n")
            text = re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", " ".join(first.split()))
            obj.docstring.value = f"{text}\n\n```text\n{rest}\n```" if rest else text
