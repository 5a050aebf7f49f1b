"""The messages a language model gets about a pair, and the form of its answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation.judges.verdicts import VERDICTS
from gipo_megatron.evaluation.types import KINDS, Pair

TEMPLATES = Path(__file__).parents[1] / "templates"
FORMS = ("text", "json")  # of an answer


def _template(name: str) -> str:
    return (TEMPLATES / f"judge_{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


SYSTEMS = {
    form: _template("system").replace("{answer}", _template(f"answer_{form}")) for form in FORMS
}
CRITERIA = {kind: _template(kind) for kind in KINDS}
TITLES = {"helpful": "CONVERSATION", "harmless": "CONVERSATION", "summary": "TEXT"}
# characters; small models repeat themselves without an end
LONGEST = 1000
# a request's response_format for `json`; the reasons come before the verdict
JSON = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "explanation": {"type": "string", "maxLength": LONGEST},
                "verdict": {"type": "string", "enum": list(VERDICTS)},
            },
            "required": ["explanation", "verdict"],
            "additionalProperties": False,
        },
    },
}


def messages(pair: Pair, form: str) -> list[dict[str, str]]:
    """Return the pair as chat messages, equal for equal pairs.

    The mark of the quoted blocks is a hash of their content, so no response can contain it.
    """
    question, first, second = pair.question, pair.first, pair.second
    mark = hashlib.sha256(json.dumps([question, first, second]).encode()).hexdigest()[:16]
    blocks = ((TITLES[pair.kind], question), ("ANSWER A", first), ("ANSWER B", second))
    quoted = "\n\n".join(
        f"BEGIN {title} {mark}\n{text}\nEND {title} {mark}" for title, text in blocks
    )
    system = SYSTEMS[form].format(criteria=CRITERIA[pair.kind], mark=mark)
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{quoted}\n\nWhich answer is better?"},
    ]


def fingerprint(form: str) -> str:
    """Return a hash that changes with any judge prompt of that form."""
    parts: list[Any] = [SYSTEMS[form], CRITERIA, TITLES]
    if form == "json":
        parts.append(JSON)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
