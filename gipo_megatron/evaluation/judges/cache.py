"""A language model's answers on disk: no request is paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation.store import Lines


@dataclass(frozen=True)
class Answer:
    """The model's text and its finish reason (stop, length, …; "refused": rejected as a whole)."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(request: dict[str, Any]) -> str:
    """Return the sha256 of everything that decides the answer: model, messages, settings."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by request_key. `put` returns when the answer is on disk; errors as in Lines."""

    def __init__(self, path: str | Path) -> None:
        self._lines = Lines(path, "judge answers 1")
        self._answers: dict[str, tuple[str, Answer]] = {}
        for number, row in self._lines.read():
            try:
                text = row["answer"].pop("said")
                self._answers[row["request"]] = row["model"], Answer(text, **row["answer"])
            except (KeyError, TypeError, AttributeError) as error:
                raise self._lines.broken(number, "not an answer") from error

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, request: str) -> Answer | None:
        return self._answers.get(request, ("", None))[1]

    def put(self, request: str, model: str, answer: Answer) -> None:
        values = asdict(answer)
        on_disk = {"said": values.pop("text"), **values}
        self._lines.append([{"request": request, "model": model, "answer": on_disk}])
        self._answers[request] = model, answer

    def of(self, model: str) -> Iterator[Answer]:
        """Return every answer of `model` in this run folder."""
        return (answer for name, answer in self._answers.values() if name == model)
