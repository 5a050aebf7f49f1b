"""Text to tokens: the whole is tokenised, then sliced; long prompts lose turns from the front, long
responses their end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.examples import BadRow, Example, Turn
from gipo_megatron.data.templates import Template, choose
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError

TOO_LONG = "the prompt is too long even with its last human turn alone"


@dataclass(frozen=True)
class Encoded:
    """One sequence; its response (tokens from `prompt_length` on) ends in end-of-text unless it was
    cut."""

    tokens: list[int]
    prompt_length: int


@dataclass
class Encoder:
    """Prompts get max_length - max_response tokens, so that a prompt is the same whatever follows
    it; responses max_response.

    Raises UserError when that leaves no room.
    """

    config: DataConfig
    tokenizer: Tokenizer
    cuts: dict[str, set[int]] = field(default_factory=dict)  # what was cut -> rows seen so far
    _templates: dict[str, Template] = field(default_factory=dict)
    # roles in turn -> why the template refuses them, or empty
    _roles: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.config.max_response < self.config.max_length:
            raise UserError(
                f"data.max_length {self.config.max_length} leaves no room for a prompt beside"
                f" max_response {self.config.max_response}",
                where="data.max_length",
                fix="make it larger than max_response",
            )

    @property
    def room(self) -> int:
        """Tokens a prompt may have."""
        return self.config.max_length - self.config.max_response

    def check(self, example: Example) -> None:
        """Raises BadRow for what no cutting can mend: roles that the template refuses, a last human
        turn without end.

        A token has at least one byte (a few are added; a normaliser may lengthen a text, hence the
        half), so only texts that could be too long are tokenised here.
        """
        if self._template(example.style).markup:
            self._check_roles(example)
        shortest = list(_shorter(example.prompt))[-1]
        text = self._template(example.style).prompt(shortest)
        if (
            2 * len(text.encode()) > self.room - 4
            and len(self._ids(text, example.style)) > self.room
        ):
            raise BadRow(TOO_LONG)

    def prompt(self, example: Example, row: int) -> tuple[list[int], str]:
        """The prompt's ids, at most `room`, and its text."""
        _, text, ids = self._fit(example, row)
        return ids, text

    def sequence(self, example: Example, row: int, response: int) -> Encoded:
        """Prompt and response number `response`, end-of-text appended.

        Where a tokenizer joins the prompt's end with the response's beginning, the joined token is
        the response's.
        """
        turns, opened, prompt_ids = self._fit(example, row)
        ids = self._ids(
            opened
            + self._template(example.style).response(opened, turns, example.responses[response]),
            example.style,
        )
        start = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
            min(len(prompt_ids), len(ids)),
        )
        if start < len(prompt_ids):
            self._cut("responses whose first token reaches back into the prompt", row)
        body = ids[start:]
        # a chat template closes the turn itself; what it writes after that is not learnt
        if self.tokenizer.eos_id in body:
            body = body[: body.index(self.tokenizer.eos_id)]
        body.append(self.tokenizer.eos_id)
        if len(body) > self.config.max_response:
            self._cut("responses were cut at max_response", row)
            body = body[: self.config.max_response]
        return Encoded(ids[:start] + body, start)

    def lines(self) -> list[str]:
        """What was cut so far, for the report."""
        return [f"so far {len(rows)} rows: {what}" for what, rows in sorted(self.cuts.items())]

    def _fit(self, example: Example, row: int) -> tuple[Sequence[Turn], str, list[int]]:
        """The most turns whose prompt has room: turns, text, ids."""
        for turns in _shorter(example.prompt):
            text = self._template(example.style).prompt(turns)
            ids = self._ids(text, example.style)
            if len(ids) <= self.room:
                if len(turns) < len(example.prompt):
                    self._cut("prompts lost turns from the front", row)
                return turns, text, ids
        raise AssertionError(f"row {row}: {TOO_LONG}, which check() refuses")

    def _template(self, style: str) -> Template:
        if style not in self._templates:
            self._templates[style] = choose(self.config.template, style, self.tokenizer)
        return self._templates[style]

    def _ids(self, text: str, style: str) -> list[int]:
        """bos comes from a chat template itself, and otherwise where the tokenizer puts one."""
        markup = self._template(style).markup
        ids = self.tokenizer.encode(text, markup=markup)
        bos = self.tokenizer.bos_id
        return (
            [bos, *ids]
            if bos is not None and self.tokenizer.begins_with_bos and not markup
            else ids
        )

    def _check_roles(self, example: Example) -> None:
        """A template refuses by roles, not by words: one try for each row of roles."""
        template = self._template(example.style)
        roles = (
            *(turn.role if turn.text.strip() else "" for turn in example.prompt),
            *("response" for _ in example.responses[:1]),
        )
        if roles not in self._roles:
            try:
                opened = template.prompt(example.prompt)
                if example.responses:
                    template.response(opened, example.prompt, example.responses[0])
                self._roles[roles] = ""
            except BadRow as reason:
                self._roles[roles] = str(reason)
        if self._roles[roles]:
            raise BadRow(self._roles[roles])

    def _cut(self, what: str, row: int) -> None:
        self.cuts.setdefault(what, set()).add(row)


def _shorter(turns: tuple[Turn, ...]) -> Iterator[Sequence[Turn]]:
    """All turns, then fewer and fewer from the front, each beginning with a human turn; the last
    human turn and a system turn stay."""
    system, rest = (turns[:1], turns[1:]) if turns[0].role == "system" else ((), turns)
    yield turns
    for start, turn in enumerate(rest):
        if start and turn.role == "user":
            yield (*system, *rest[start:])
