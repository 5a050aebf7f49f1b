"""Append-only files of finished work: after a kill and restart nothing is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.types import PairOrder, Response, TaskPrompt, Verdict
from gipo_megatron.files import append_jsonl, bad_line, read_jsonl, write_jsonl
from gipo_megatron.typed import Mismatch, built

FIX = "remove the line: its content is made again"


class Lines:
    """JSON objects, one per line, append-only. The first line holds `key`.

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

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, row) without the head line."""
        return islice(read_jsonl(self.path, FIX), 1, None)

    def broken(self, number: int, why: str) -> UserError:
        return bad_line(self.path, number, why, FIX)


class ResponseStore:
    """The responses of one policy. `done`: the prompt_ids that have one."""

    def __init__(self, path: str | Path) -> None:
        self._lines = Lines(path)
        self.done: set[str] = {response.prompt_id for response in self.read()}

    def append(self, responses: Sequence[Response]) -> None:
        self._lines.append([asdict(response) for response in responses])
        self.done.update(response.prompt_id for response in responses)

    def read(self) -> list[Response]:
        """Return one response per prompt, the first written. Raises UserError for a bad line."""
        found: dict[str, Response] = {}
        for number, row in self._lines.read():
            try:
                response = built(Response, row)
            except Mismatch as error:
                raise self._lines.broken(number, f"not a response: {error}") from error
            found.setdefault(response.prompt_id, response)
        return list(found.values())


class VerdictStore:
    """Verdicts by PairOrder; a later verdict on a key, after a failure, replaces the first."""

    def __init__(self, path: str | Path, key: str = "") -> None:
        self._lines = Lines(path, key)

    def append(self, verdicts: Mapping[PairOrder, Verdict]) -> None:
        self._lines.append([key._asdict() | asdict(verdict) for key, verdict in verdicts.items()])

    def read(self) -> dict[PairOrder, Verdict]:
        """Return all verdicts. Raises UserError for a bad line."""
        found: dict[PairOrder, Verdict] = {}
        for number, row in self._lines.read():
            try:
                key = PairOrder(*(row.pop(name) for name in PairOrder._fields))
                found[key] = built(Verdict, row)
            except (KeyError, TypeError, Mismatch) as error:
                raise self._lines.broken(number, f"not a verdict: {error}") from error
        return found


def write_prompts(path: str | Path, prompts: Sequence[TaskPrompt]) -> None:
    """Write prompts.jsonl, all or nothing."""
    write_jsonl(path, map(asdict, prompts))
