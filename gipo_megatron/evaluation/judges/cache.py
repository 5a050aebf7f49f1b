"""Answers of a language model on disk: what was paid for once is never asked again."""

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
    """What the model said, and why it stopped (stop, length, …; a refusal to answer at all is kept
    too)."""

    said: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(request: dict[str, Any]) -> str:
    """sha256 of all that decides the answer: model, messages, settings."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by request_key. `put` returns when the answer is on disk. UserError as Lines."""

    def __init__(self, path: str | Path) -> None:
        self._lines = Lines(path, "judge answers 1")
        self._answers: dict[str, tuple[str, Answer]] = {}
        for number, row in enumerate(self._lines.read(), 2):
            try:
                self._answers[row["request"]] = row["model"], Answer(**row["answer"])
            except (KeyError, TypeError) as error:
                raise self._lines.broken(number, "not an answer") from error

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, request: str) -> Answer | None:
        found = self._answers.get(request)
        return found[1] if found else None

    def put(self, request: str, model: str, answer: Answer) -> None:
        self._lines.append([{"request": request, "model": model, "answer": asdict(answer)}])
        self._answers[request] = model, answer

    def of(self, model: str) -> Iterator[Answer]:
        """Every answer that `model` ever gave in this run folder."""
        return (answer for name, answer in self._answers.values() if name == model)
