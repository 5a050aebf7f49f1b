"""What an evaluation has finished, line by line on disk: killed at any moment and restarted, it
repeats none of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.results import Presentation
from gipo_megatron.evaluation.types import Response, TaskPrompt, Verdict
from gipo_megatron.files import append_jsonl, bad_line, read_jsonl, write_jsonl

FIX = "remove the line: what it held is made again"


class Lines:
    """JSON objects, one a line, only ever appended. The first line holds `key`.

    Raises UserError for a file with another key, an unreadable line, or a failed write.
    """

    def __init__(self, path: str | Path, key: str = "") -> None:
        self.path, self.key = Path(path), key
        head = next(read_jsonl(self.path, FIX), None)
        self._empty = head is None
        if head is not None and head[1] != {"key": key}:
            raise UserError(
                f"{self.path.name} was made by other policies, prompts, or settings, or by another"
                " program",
                where=str(self.path),
                fix="choose another run.dir, or remove this file",
            )

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Return when the rows are on disk."""
        if rows:
            head = [{"key": self.key}] if self._empty else []
            append_jsonl(self.path, [*head, *rows], sync=True)
            self._empty = False

    def read(self) -> list[dict[str, Any]]:
        """Return all rows in their order, without the head line."""
        return [row for _, row in read_jsonl(self.path, FIX)][1:]

    def broken(self, number: int, why: str) -> UserError:
        return bad_line(self.path, number, why, FIX)


class ResponseStore:
    """The responses of one policy. `key`: a fingerprint of its weights and of the generation
    settings; `done`: answered prompt_ids."""

    def __init__(self, path: str | Path, key: str = "") -> None:
        self._lines = Lines(path, key)
        self.done: set[str] = {response.prompt_id for response in self.read()}

    def append(self, responses: Sequence[Response]) -> None:
        self._lines.append([asdict(response) for response in responses])
        self.done.update(response.prompt_id for response in responses)

    def read(self) -> list[Response]:
        """One a prompt, in the order of their first writing. UserError for a line that holds no
        response."""
        found: dict[str, Response] = {}
        for number, row in enumerate(self._lines.read(), 2):
            try:
                response = Response(**row)
            except TypeError as error:
                raise self._lines.broken(number, "not a response") from error
            found.setdefault(response.prompt_id, response)
        return list(found.values())


class VerdictStore:
    """Verdicts by presentation; one that is written again (a failure that was asked anew) replaces
    the older one."""

    def __init__(self, path: str | Path, key: str = "") -> None:
        self._lines = Lines(path, key)
        self.done: set[Presentation] = set(self.read())

    def append(self, verdicts: Mapping[Presentation, Verdict]) -> None:
        names = ("task", "opponent", "prompt_id", "subject_first")
        self._lines.append(
            [
                dict(zip(names, key, strict=True)) | asdict(verdict)
                for key, verdict in verdicts.items()
            ]
        )
        self.done.update(verdicts)

    def read(self) -> dict[Presentation, Verdict]:
        """UserError for a line that holds no verdict."""
        found: dict[Presentation, Verdict] = {}
        for number, row in enumerate(self._lines.read(), 2):
            try:
                key = (
                    row.pop("task"),
                    row.pop("opponent"),
                    row.pop("prompt_id"),
                    row.pop("subject_first"),
                )
                found[key] = Verdict(**row)
            except (KeyError, TypeError) as error:
                raise self._lines.broken(number, "not a verdict") from error
        return found


def write_prompts(path: str | Path, prompts: Sequence[TaskPrompt]) -> None:
    """Write all or nothing: the file is the same in every restart."""
    write_jsonl(path, map(asdict, prompts))
