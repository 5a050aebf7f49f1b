"""What an evaluation has finished, line by line on disk: killed at any moment and restarted, it
repeats none of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.results import Presentation
from gipo_megatron.evaluation.types import Response, TaskPrompt, Verdict


class Lines:
    """JSON objects, one a line, only ever appended. A last line without its end (a kill while
    writing) is cut away on opening.

    The first line keeps `key`. Raises UserError when a file was written under another key, is no
    such file, or cannot be written.
    """

    def __init__(self, path: str | Path, key: str = "") -> None:
        self.path, self.key = Path(path), key
        self._cut_torn_line()
        head = next(self._objects(), None)
        if head is not None and head != {"key": key}:
            raise UserError(
                f"{self.path.name} was made by other policies, prompts, or settings, or by another"
                " program",
                where=str(self.path),
                fix="choose another run.dir, or remove this file",
            )

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """On disk, and not only on its way there, when this returns."""
        if not rows:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                head = [{"key": self.key}] if file.tell() == 0 else []
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in (*head, *rows)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write: {error.strerror}",
                where=str(self.path),
                fix="free some space, or choose another run.dir",
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All rows in their order, the head line left out. UserError for a line that is no JSON
        object."""
        return list(self._objects())[1:]

    def broken(self, number: int, why: str) -> UserError:
        return UserError(
            f"unreadable line: {why}",
            where=f"{self.path} line {number}",
            fix="remove the line: what it held is made again",
        )

    def _objects(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:  # JSON's and UTF-8's
                    raise self.broken(number, str(error)) from error
                if not isinstance(row, dict):
                    raise self.broken(number, f"a JSON {type(row).__name__}, not an object")
                yield row

    def _cut_torn_line(self) -> None:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


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
    """All at once, or nothing: the file is the same in every restart."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(
        "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts), encoding="utf-8"
    )
    os.replace(partial, target)
