"""Examples to text: which words a model sees around a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2

from gipo_megatron.data.examples import BadRow, Turn
from gipo_megatron.data.schemas import ASSISTANT, HUMAN
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError

HEADS = {"user": HUMAN, "assistant": ASSISTANT}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n'"
    " }}{% endif %}"
)
# hh() over messages: turns as the prompt has them; a finished last turn as a response, end-of-text
# included.
HH = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + text }}"
    "{% elif message['role'] == 'assistant' and loop.last and not add_generation_prompt %}"
    "{{ '\\n\\nAssistant:' + ('' if text[:1].isspace() else ' ') + text + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + text }}"
    "{% else %}{{ text }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
NAMES = ("auto", "chat", "hh", "plain", "chatml")


@dataclass(frozen=True)
class Template:
    """`prompt(turns)` opens the assistant's turn; `response(prompt text, turns, reply)` is what
    follows it."""

    name: str
    markup: bool  # the text holds names of special tokens, bos included, that must become ids
    prompt: Callable[[Sequence[Turn]], str]
    response: Callable[[str, Sequence[Turn], str], str]


def plain() -> Template:
    """prompt + response as they are, nothing between them. UserError for a conversation, which has
    to have heads."""

    def prompt(turns: Sequence[Turn]) -> str:
        if [turn.role for turn in turns] != ["text"]:
            raise UserError(
                "template plain takes prompts that are text, not conversations",
                where="data.template",
                fix="use chat, chatml or hh",
            )
        return turns[0].text

    return Template("plain", False, prompt, lambda _prompt, _turns, reply: reply)


def hh(style: str) -> Template:
    """`\\n\\nHuman: …\\n\\nAssistant:`, then the response with its leading space. A transcript
    keeps its text, letter by letter."""

    def prompt(turns: Sequence[Turn]) -> str:
        if style == "transcript":
            return "".join(HEADS.get(turn.role, "") + turn.text for turn in turns) + ASSISTANT
        heads = {
            "system": "",
            "user": f"{HUMAN} ",
            "text": f"{HUMAN} ",
            "assistant": f"{ASSISTANT} ",
        }
        return "".join(heads[turn.role] + turn.text for turn in turns) + ASSISTANT

    def response(_prompt: str, _turns: Sequence[Turn], reply: str) -> str:
        return reply if style == "transcript" or reply[:1].isspace() else f" {reply}"

    return Template("hh", False, prompt, response)


def chat(tokenizer: Tokenizer, template: str, name: str) -> Template:
    """A jinja chat template, over messages that alternate (see `messages`).

    Both verbs raise BadRow where the template refuses the roles, or writes a finished turn
    otherwise than an opened one.
    """

    def render(messages: list[dict[str, str]], generation: bool) -> str:
        try:
            return tokenizer.render(messages, template, generation)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid jinja: {error}", where="data.template"
            ) from error
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from error

    def prompt(turns: Sequence[Turn]) -> str:
        return render(messages(turns), True)

    def response(opened: str, turns: Sequence[Turn], reply: str) -> str:
        whole = render([*messages(turns), {"role": "assistant", "content": reply.strip()}], False)
        if not whole.startswith(opened):
            raise BadRow("the chat template writes a finished turn otherwise than an opened one")
        return whole[len(opened) :]

    return Template(name, True, prompt, response)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as alternating messages: empty ones left out, neighbours of one role joined, text
    outside a turn the user's."""
    joined: list[dict[str, str]] = []
    for turn in turns:
        role, content = "user" if turn.role == "text" else turn.role, turn.text.strip()
        if not content:
            continue
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += "\n\n" + content
        else:
            joined.append({"role": role, "content": content})
    return joined


def choose(spec: str, style: str, tokenizer: Tokenizer) -> Template:
    """The template of an example of `style` (text | transcript | messages) under the recipe's
    `data.template`.

    auto: text -> plain; transcript -> hh; messages -> the tokenizer's chat template, or hh where it
    has none. Raises UserError for an unknown name, and for `chat` with a tokenizer that has no chat
    template.
    """
    if spec == "auto":
        spec = {
            "text": "plain",
            "transcript": "hh",
            "messages": "chat" if tokenizer.chat_template else "hh",
        }[style]
    if spec == "plain":
        return hh(style) if style == "transcript" else plain()
    if spec == "hh":
        return hh(style)
    if spec == "chatml":
        return chat(tokenizer, CHATML, "chatml")
    if spec == "chat":
        if tokenizer.chat_template is None:
            raise UserError(
                "this tokenizer has no chat template",
                where="data.template",
                fix="use hh, plain, chatml, or write a jinja template",
            )
        return chat(tokenizer, tokenizer.chat_template, "chat")
    if "{{" in spec or "{%" in spec:
        return chat(tokenizer, spec, "jinja")
    raise UserError(
        f"unknown template {spec!r}",
        where="data.template",
        fix=f"use {', '.join(NAMES)}, or a jinja template",
    )


def as_chat_template(spec: str, tokenizer: Tokenizer, style: str = "messages") -> str | None:
    """The jinja text with which transformers' `apply_chat_template` gives the ids an Encoder gives
    a prompt under `spec`.

    `style`: what the rows were, which decides `auto`. None where no such text exists: plain, or a
    tokenizer that cuts text after bos otherwise than text alone. Names of special tokens that a
    message spells out become ids here; under hh training keeps them text. Raises UserError as
    `choose` does.
    """
    name = choose(spec, style, tokenizer).name
    return (
        _hh_jinja(tokenizer)
        if name == "hh"
        else {"plain": None, "chatml": CHATML, "chat": tokenizer.chat_template, "jinja": spec}[name]
    )


def _hh_jinja(tokenizer: Tokenizer) -> str | None:
    """HH with bos in front where the tokenizer writes one: `apply_chat_template` adds none.

    Some tokenizers put a space before a text that begins at once, and none after bos: there the
    template writes the space.
    """
    if not tokenizer.begins_with_bos:
        return HH
    trials = (
        (Turn("user", "a"),),
        (Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c"), Turn("user", "d")),
    )
    expected = [
        [tokenizer.bos_id, *tokenizer.encode(hh("messages").prompt(turns))] for turns in trials
    ]
    for opening in ("{{ bos_token }}", "{{ bos_token + ' ' }}"):
        texts = [tokenizer.render(messages(turns), opening + HH, True) for turns in trials]
        if [tokenizer.encode(text, markup=True) for text in texts] == expected:
            return opening + HH
    return None


def parting(text: str, other: str, shown: int = 40) -> str:
    """`text` quoted as far as a line can show it: whole when both are short, else from shortly
    before it parts from `other`."""
    same = next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b),
        min(len(text), len(other)),
    )
    start = max(0, same - shown // 2) if max(len(text), len(other)) > shown else 0
    return (
        ("…" if start else "")
        + repr(text[start : start + shown])
        + ("…" if text[start + shown :] else "")
    )
