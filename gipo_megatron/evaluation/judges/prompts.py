"""The messages a language model gets about a pair, and how its verdict is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from gipo_megatron.evaluation.types import FIRST, KINDS, SECOND, TIE, Pair

TEMPLATES = Path(__file__).parents[1] / "templates"


def _template(name: str) -> str:
    return (TEMPLATES / f"judge_{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


SYSTEM = _template("system")
CRITERIA = {kind: _template(kind) for kind in KINDS}
TITLES = {"helpful": "CONVERSATION", "harmless": "CONVERSATION", "summary": "TEXT"}
VERDICTS = {"A": FIRST, "B": SECOND, "C": TIE}
_TOKEN = re.compile(r"\[\[([ABC])\]\]")


def messages(pair: Pair) -> list[dict[str, str]]:
    """Return the pair as chat messages, equal for equal pairs.

    The mark of the quoted blocks is a hash of their content, so no response can contain it.
    """
    question, first, second = pair.question, pair.first, pair.second
    mark = hashlib.sha256(json.dumps([question, first, second]).encode()).hexdigest()[:16]
    blocks = ((TITLES[pair.kind], question), ("ANSWER A", first), ("ANSWER B", second))
    quoted = "\n\n".join(
        f"BEGIN {title} {mark}\n{text}\nEND {title} {mark}" for title, text in blocks
    )
    return [
        {"role": "system", "content": SYSTEM.format(criteria=CRITERIA[pair.kind], mark=mark)},
        {"role": "user", "content": f"{quoted}\n\nWhich answer is better?"},
    ]


def choice(text: str) -> str | None:
    """Return FIRST, SECOND or TIE by the last verdict token of the text; None without one."""
    tokens = _TOKEN.findall(text)
    return VERDICTS[tokens[-1]] if tokens else None


def ends_with_verdict(text: str) -> bool:
    """Return whether a verdict token is the last thing in the text, markup aside."""
    return re.search(rf"{_TOKEN.pattern}\W*\Z", text) is not None


def fingerprint() -> str:
    """Return a hash that changes with any judge prompt."""
    return hashlib.sha256(json.dumps([SYSTEM, CRITERIA, TITLES]).encode()).hexdigest()[:16]
