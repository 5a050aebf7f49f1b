"""Rows to Examples: standard and conversational columns (TRL's), ShareGPT's chats, Alpaca's
instructions, HH transcripts, OpenAI's posts and comparisons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gipo_megatron.data import tldr
from gipo_megatron.data.chats import answered, parsed, reply_of, turns_of
from gipo_megatron.data.config import COLUMNS
from gipo_megatron.data.examples import BadRow, Example, Tally, Turn, common_length
from gipo_megatron.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HEADS = {"Human": "user", "Assistant": "assistant"}
LAST_ONLY = "of several assistant turns the last is learnt, the others are its prompt"
END_MARK = "<|endoftext|>"  # some files end their completions with it, as text
_Parts = tuple[str, tuple[Turn, ...], tuple[str, ...]]  # style, prompt, responses
_NEEDS: dict[str, list[tuple[str, ...]]] = {  # format -> sets of columns, one of which is needed
    "preference": [("chosen", "rejected")],
    "prompt": [("prompt",), ("messages",)],
    "sft": [("prompt", "response"), ("messages",)],
}
_ALSO = {  # our name -> other names that data sets give it
    "prompt": ("instruction",),
    "response": ("completion", "label", "output"),
    "messages": ("conversations",),
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
        self._name = {ours: _column(ours, columns, found, head) for ours in COLUMNS}
        self.has = {ours for ours in COLUMNS if self._name[ours] in found}
        chosen = [row.get(self._name["chosen"]) for row in head]
        replies = "prompt" not in self.has and any(isinstance(x, dict) for x in chosen)
        if replies and "messages" in self.has:
            self._name["prompt"] = self._name["messages"]  # ShareGPT's pairs: replies to a chat
            self.has.add("prompt")
        self.reads = self._choose(found, where)
        joins = self._name["prompt"] == "instruction" and "input" not in columns.values()
        self._input = "input" if joins else ""
        used = {self._input, "split", *(self._name[ours] for ours in self.reads)}
        given = dict.fromkeys(name for row in head for name in row)
        if not given.keys() <= {*found}:  # OpenAI's posts and comparisons
            used |= {*tldr.POST}
        self.unread = [name for name in given if name in found and name not in used]
        self._no_extras = {*COLUMNS, *self._name.values(), self._input}
        self.transcripts = "prompt" not in self.reads and any(map(is_transcript, chosen))

    def _choose(self, found: list[str], where: str) -> set[str]:
        """Return our names of the columns that are read: of the sets that the format can do with,
        one that the user mapped, else the first."""
        choices, mapped = _NEEDS[self.format], self.columns.keys()
        complete = [choice for choice in choices if self.has.issuperset(choice)]
        best = {*max(complete, key=lambda choice: len(mapped & {*choice}), default=())}
        missing = [ours for ours in self.columns if ours not in self.has]
        wanted = {ours for choice in choices for ours in choice} & mapped
        if best and not missing and (not wanted or wanted & best):
            optional = {"prompt"} & self.has if self.format == "preference" else set()
            return best | optional | ({"source"} & mapped)
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
        if "messages" in self.reads and responses and any(t.role == "assistant" for t in prompt):
            tally.change(LAST_ONLY, where)
        if "source" in self.columns and row.get(self._name["source"]) not in (None, ""):
            source = str(row[self._name["source"]])
        _check_unicode(source, *(turn.text for turn in prompt), *responses)
        extras = {
            name: value
            for name, value in row.items()
            if name not in self._no_extras and isinstance(value, str | int | float | bool)
        }
        return Example(style, prompt, responses, source, extras)

    def _preference(self, row: dict[str, Any]) -> _Parts:
        chosen, rejected = self._value(row, "chosen"), self._value(row, "rejected")
        if "prompt" in self.reads:
            asked = self._value(row, "prompt")
            (style, prompt, x), (_, other, y) = (_reply(asked, z) for z in (chosen, rejected))
        elif not (isinstance(chosen, str) and isinstance(rejected, str)):
            style, a, b = "messages", turns_of(chosen), turns_of(rejected)
            prompt, other, x, y = a[:-1], b[:-1], reply_of(a[-1]), reply_of(b[-1])
        elif self.transcripts:
            (start, x), (end, y) = split_transcript(chosen), split_transcript(rejected)
            style, prompt, other = "transcript", transcript_turns(start), transcript_turns(end)
        else:
            start, x, y = split_common(chosen, rejected)
            style, prompt = "text", (Turn("text", start),)
            other = prompt
        if prompt != other:
            raise BadRow("chosen and rejected have different prompts")
        return style, prompt, (x, y)

    def _single(self, row: dict[str, Any]) -> _Parts:
        sft = self.format == "sft"
        if "prompt" in self.reads:
            prompt = self._value(row, "prompt")
            if not sft:
                return *_prompt(prompt), ()
            style, turns, reply = _reply(prompt, self._value(row, "response"))
            return style, turns, (reply,)
        turns = turns_of(self._value(row, "messages"))
        if sft:
            return "messages", turns[:-1], (reply_of(turns[-1]),)
        return "messages", turns[:-1] if turns[-1].role == "assistant" else turns, ()

    def _value(self, row: dict[str, Any], ours: str) -> Any:
        """Return a text or a list of messages. Raises BadRow."""
        value = parsed(row.get(self._name[ours]))
        if value is None or value == []:
            raise BadRow(f"no value for {ours}")
        if not isinstance(value, str | list):
            raise BadRow(f"{ours} is neither text nor a chat, but {type(value).__name__}")
        more = row.get(self._input) if ours == "prompt" else None
        if isinstance(value, str) and more is not None and str(more).strip():
            return f"{value}\n\n{more}"
        return value


def _column(
    ours: str, columns: dict[str, str], found: list[str], head: Sequence[dict[str, Any]]
) -> str:
    """Return the file's column for ours: the mapped one, the one of the same name, or another usual
    name. A label is a response where it is text (TL;DR's posts)."""
    if ours in columns:
        return columns[ours]
    for name in (ours, *_ALSO.get(ours, ())):
        if name in found and (
            name != "label" or any(isinstance(row.get(name), str) for row in head)
        ):
            return name
    return ours


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
        return "messages", turns_of(value)
    if is_transcript(value):
        return "transcript", transcript_turns(value.rstrip())
    return "text", (Turn("text", value),)


def _reply(prompt: str | list[Any], answer: str | list[Any]) -> tuple[str, tuple[Turn, ...], str]:
    """Return (style, prompt, reply). The answer is the reply, or a whole transcript or chat that
    holds the prompt, too. Raises BadRow."""
    style, turns = _prompt(prompt)
    if isinstance(answer, str):
        start = prompt.rstrip() if isinstance(prompt, str) and style == "transcript" else ""
        return style, turns, answer.removeprefix(start)
    chat = turns_of(answer)
    if style == "text":
        style, turns = "messages", (Turn("user", turns[0].text),)
        asked = turns[0].text.strip()
        if any(turn.role == "user" and turn.text.strip() == asked for turn in chat[:-1]):
            turns = chat[:-1]
    return style, *answered(turns, chat)


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


def _check_unicode(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadRow("not valid Unicode (a lone surrogate)") from error
