"""Text to tokens. The whole text is tokenised, then cut: long prompts lose turns from the front,
long responses lose their end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.examples import BadRow, Example, Turn, common_length
from gipo_megatron.data.templates import Template, choose
from gipo_megatron.data.tokenizer import Tokenizer, unspelled
from gipo_megatron.errors import UserError

TOO_LONG = "the prompt is too long even with its last human turn alone"


@dataclass(frozen=True)
class Encoded:
    """One sequence. Its response, the tokens from `prompt_length` on, ends in one of the
    tokenizer's end tokens unless it was cut."""

    tokens: list[int]
    prompt_length: int


@dataclass
class Encoder:
    """Encode prompts in max_length - max_response tokens, so that a prompt does not depend on its
    response, and responses in max_response tokens.

    Raises UserError when no tokens are left for prompts.
    """

    config: DataConfig
    tokenizer: Tokenizer
    cuts: dict[str, set[int]] = field(default_factory=dict)  # what was cut -> rows so far
    _templates: dict[str, Template] = field(default_factory=dict)

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
        """Raises BadRow for a row that `prompt` or `sequence` could not write: the template refuses
        it, or its last human turn does not fit.

        A chat template may refuse any text, not only roles, so each row is written here once. A
        token has at least one byte. A few tokens are added, and a normaliser may lengthen a text,
        hence the half. So only texts that could be too long are tokenised here.
        """
        template = self._template(example.style)
        *_, shortest = _shorter(example.prompt)
        for turns in _shorter(example.prompt) if template.markup else (shortest,):
            text = template.prompt(turns)
            if template.markup:
                for reply in example.responses:
                    template.response(text, turns, reply)
            if 2 * len(text.encode()) <= self.room - 4:
                return
        if len(self._ids(text, template)) > self.room:
            raise BadRow(TOO_LONG)

    def prompt(self, example: Example, row: int) -> tuple[list[int], str]:
        """Return the prompt's ids, at most `room`, and its text."""
        _, text, ids = self._fit(example, row)
        return ids, unspelled(text)

    def sequence(self, example: Example, row: int, response: int) -> Encoded:
        """Return the prompt and response number `response`, with an end token after it: the one
        that the template closes the turn with, else end-of-text.

        A token that joins the prompt's end and the response's beginning belongs to the response.
        """
        template = self._template(example.style)
        turns, opened, prompt_ids = self._fit(example, row)
        closed = opened + template.response(opened, turns, example.responses[response])
        ids = self._ids(closed, template)
        start = common_length(prompt_ids, ids)
        if start < len(prompt_ids):
            self._cut("responses whose first token reaches back into the prompt", row)
        body = ids[start:]
        ends = [place for place, token in enumerate(body) if token in self.tokenizer.end_ids]
        # a chat template closes the turn; its text after that is not trained on
        body = body[: ends[0] + 1] if ends else [*body, self.tokenizer.eos_id]
        if len(body) > self.config.max_response:
            self._cut("responses were cut at max_response", row)
            body = body[: self.config.max_response]
        return Encoded(ids[:start] + body, start)

    def lines(self) -> list[str]:
        """Return the report's lines on what was cut so far."""
        return [f"so far {len(rows)} rows: {what}" for what, rows in sorted(self.cuts.items())]

    def _fit(self, example: Example, row: int) -> tuple[Sequence[Turn], str, list[int]]:
        """Return as many turns as fit, their text and ids."""
        template = self._template(example.style)
        for turns in _shorter(example.prompt):
            text = template.prompt(turns)
            ids = self._ids(text, template)
            if len(ids) <= self.room:
                if len(turns) < len(example.prompt):
                    self._cut("prompts lost turns from the front", row)
                return turns, text, ids
        raise AssertionError(f"row {row}: {TOO_LONG}, which check() refuses")

    def _template(self, style: str) -> Template:
        if style not in self._templates:
            self._templates[style] = choose(self.config.template, style, self.tokenizer)
        return self._templates[style]

    def _ids(self, text: str, template: Template) -> list[int]:
        """Tokenise. A chat template writes bos itself; otherwise the tokenizer's rule decides."""
        ids = self.tokenizer.encode(text, markup=template.markup)
        bos = self.tokenizer.bos_id
        if bos is None or template.markup or not self.tokenizer.begins_with_bos:
            return ids
        return [bos, *ids]

    def _cut(self, what: str, row: int) -> None:
        self.cuts.setdefault(what, set()).add(row)


def _shorter(turns: tuple[Turn, ...]) -> Iterator[Sequence[Turn]]:
    """Yield all turns, then fewer and fewer from the front, each time beginning with a human turn.
    A system turn and the last human turn stay."""
    system, rest = (turns[:1], turns[1:]) if turns[0].role == "system" else ((), turns)
    yield turns
    for start, turn in enumerate(rest):
        if start and turn.role == "user":
            yield (*system, *rest[start:])
