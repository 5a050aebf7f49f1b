"""Rows to Examples: standard and conversational columns (TRL's), HH transcripts, OpenAI's posts and
comparisons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gipo_megatron.data import tldr
from gipo_megatron.data.config import COLUMNS
from gipo_megatron.data.examples import BadRow, Example, Tally, Turn, common_length
from gipo_megatron.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HEADS = {"Human": "user", "Assistant": "assistant"}
END_MARK = "<|endoftext|>"  # some files end their completions with it, as text
ROLES = ("system", "user", "assistant")
_Parts = tuple[str, tuple[Turn, ...], tuple[str, ...]]  # style, prompt, responses
_NEEDS: dict[str, list[tuple[str, ...]]] = {  # format -> sets of columns, one of which is needed
    "preference": [("chosen", "rejected")],
    "prompt": [("prompt",), ("messages",)],
    "sft": [("prompt", "response"), ("messages",)],
}
_HEAD = re.compile(r"\n\n(Human|Assistant):")


class Schema:
    """The layout of one file's rows, found once from its columns and first rows.

    Raises UserError that lists the columns when a needed one is missing.
    """

    def __init__(
        self, format: str, columns: dict[str, str], head: Sequence[dict[str, Any]], where: str
    ) -> None:
        for ours in columns:
            if ours not in COLUMNS:
                raise UserError(
                    f"data.columns: unknown name {ours!r}",
                    where="data.columns",
                    fix=f"use {', '.join(COLUMNS)}",
                )
        self.format, self.columns = format, columns
        self._standard, found = tldr.recognise(format, columns, head)
        self._name = {ours: columns.get(ours, ours) for ours in COLUMNS}
        if "response" not in columns and "response" not in found:
            self._name["response"] = _response_column(head)
        self._used = set(self._name.values())
        self.has = {ours for ours in COLUMNS if self._name[ours] in found}
        self._require(found, where)
        self.transcripts = "prompt" not in self.has and any(
            is_transcript(row.get(self._name["chosen"])) for row in head
        )

    def _require(self, found: list[str], where: str) -> None:
        choices = _NEEDS[self.format]
        missing = [ours for ours in self.columns if ours not in self.has]
        if not missing and any(self.has.issuperset(choice) for choice in choices):
            return
        needs = " or ".join(" + ".join(self._name[ours] for ours in choice) for choice in choices)
        absent = "".join(f"; no column {self._name[ours]!r}" for ours in missing)
        example = f"{{{choices[0][-1]}: {found[-1] if found else 'NAME'}}}"
        raise UserError(
            f"data.format {self.format} needs the columns {needs}{absent};"
            f" found: {', '.join(found)}",
            where=where,
            fix=f"map our names to yours, as in data.columns={example}",
        )

    def read(self, row: dict[str, Any], source: str, tally: Tally, where: str) -> Example:
        """Return the row as an Example. Raises BadRow(reason)."""
        row = self._standard(row)
        read = self._preference if self.format == "preference" else self._single
        style, prompt, responses = read(row)
        responses = tuple(_without_end_mark(text, tally, where) for text in responses)
        _check(prompt, responses)
        if "source" in self.columns:
            source = str(row.get(self._name["source"]))
        extras = {
            name: value
            for name, value in row.items()
            if name not in self._used and isinstance(value, str | int | float | bool)
        }
        return Example(style, prompt, responses, source, extras)

    def _preference(self, row: dict[str, Any]) -> _Parts:
        chosen, rejected = self._value(row, "chosen"), self._value(row, "rejected")
        if "prompt" in self.has:
            style, prompt = _prompt(self._value(row, "prompt"))
            return style, prompt, (_response(chosen), _response(rejected))
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            a, b = _messages(chosen), _messages(rejected)
            if len(a) != len(b) or a[:-1] != b[:-1]:
                raise BadRow("chosen and rejected have different prompts")
            return "messages", a[:-1], (_reply(a[-1]), _reply(b[-1]))
        if not self.transcripts:
            start, *responses = split_common(chosen, rejected)
            return "text", (Turn("text", start),), tuple(responses)
        (start, x), (other, y) = split_transcript(chosen), split_transcript(rejected)
        if start != other:
            raise BadRow("chosen and rejected have different prompts")
        return "transcript", transcript_turns(start), (x, y)

    def _single(self, row: dict[str, Any]) -> _Parts:
        sft = self.format == "sft"
        if "prompt" in self.has and (not sft or "response" in self.has):
            style, prompt = _prompt(self._value(row, "prompt"))
            return style, prompt, (_response(self._value(row, "response")),) if sft else ()
        turns = _messages(self._value(row, "messages"))
        if sft:
            return "messages", turns[:-1], (_reply(turns[-1]),)
        return "messages", turns[:-1] if turns[-1].role == "assistant" else turns, ()

    def _value(self, row: dict[str, Any], ours: str) -> Any:
        value = row.get(self._name[ours])
        if not isinstance(value, str | list) or value == []:
            raise BadRow(f"no value for {ours}")
        return value


def _response_column(head: Sequence[dict[str, Any]]) -> str:
    """Return the column of `response`: TRL's completion, or label where that is text (TL;DR's
    posts)."""
    if any("completion" in row for row in head):
        return "completion"
    return "label" if any(isinstance(row.get("label"), str) for row in head) else "response"


def is_transcript(text: Any) -> bool:
    return isinstance(text, str) and HUMAN in text and ASSISTANT in text


def split_transcript(text: str) -> tuple[str, str]:
    """Return (prompt up to and with the last `Assistant:`, response with its leading space). Raises
    BadRow."""
    start, head, response = text.rpartition(ASSISTANT)
    if not head:
        raise BadRow("no Assistant turn")
    if HUMAN in response:
        raise BadRow("the last turn is the human's")
    return start + head, response


def split_common(a: str, b: str) -> tuple[str, str, str]:
    """Return (implicit prompt, rest of a, rest of b). The prompt is the common beginning, cut back
    to before its last white space, so that no word is split."""
    prompt = a[: common_length(a, b)]
    last_space = max((i for i, x in enumerate(prompt) if x.isspace()), default=0)
    prompt = prompt[:last_space].rstrip()
    return prompt, a[len(prompt) :], b[len(prompt) :]


def transcript_turns(prompt: str) -> tuple[Turn, ...]:
    """Return the turns of `…\\n\\nHuman: x\\n\\nAssistant:` without the open last head. Text before
    the first head is a `text` turn."""
    if not prompt.endswith(ASSISTANT):
        raise BadRow("the prompt does not end in an open Assistant turn")
    start, *rest = _HEAD.split(prompt.removesuffix(ASSISTANT))
    turns = [Turn("text", start)] if start else []
    for head, text in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Turn(HEADS[head], text))
    return tuple(turns)


def _prompt(value: str | list[Any]) -> tuple[str, tuple[Turn, ...]]:
    if isinstance(value, list):
        return "messages", _messages(value)
    if is_transcript(value):
        return "transcript", transcript_turns(value.rstrip())
    return "text", (Turn("text", value),)


def _response(value: str | list[Any]) -> str:
    if isinstance(value, str):
        return value
    turns = _messages(value)
    if len(turns) != 1:
        raise BadRow("a response of more than one turn")
    return _reply(turns[0])


def _messages(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow("not a list of messages")
    turns = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("a message without text content")
        if message.get("role") not in ROLES:
            raise BadRow("a role that is none of system, user, assistant")
        turns.append(Turn(message["role"], message["content"]))
    return tuple(turns)


def _reply(turn: Turn) -> str:
    if turn.role != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return turn.text


def _without_end_mark(text: str, tally: Tally, where: str) -> str:
    stripped = text.rstrip()
    if not stripped.endswith(END_MARK):
        return text
    tally.change(f"a literal {END_MARK} at the end of a response was removed", where)
    return stripped.removesuffix(END_MARK)


def _check(prompt: tuple[Turn, ...], responses: tuple[str, ...]) -> None:
    if any(not text.strip() for text in responses):
        raise BadRow("empty response")
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        raise BadRow("chosen equals rejected")
    if not any(turn.role in ("user", "text") and turn.text.strip() for turn in prompt):
        raise BadRow("no human turn")
    try:
        "".join((*(turn.text for turn in prompt), *responses)).encode()
    except UnicodeEncodeError as error:
        raise BadRow("not valid Unicode (a lone surrogate)") from error
