"""Examples to text: the words around a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2

from gipo_megatron.data.examples import BadRow, Turn, common_length
from gipo_megatron.data.schemas import ASSISTANT, HUMAN
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n'"
    " }}{% endif %}"
)
# hh() over messages: turns as in a prompt, and a finished last turn as a response with end-of-text.
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
    """`prompt(turns)` ends with the assistant's open turn; `response(prompt text, turns, reply)` is
    the text after it. Both are for Tokenizer.encode: `unspelled` is the text to show."""

    name: str
    markup: bool  # names of special tokens in the text, bos included, must become their ids
    prompt: Callable[[Sequence[Turn]], str]
    response: Callable[[str, Sequence[Turn], str], str]


def plain() -> Template:
    """Return prompt + response with nothing between them. Raises UserError for a conversation,
    whose turns need heads."""

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
    """Return `\\n\\nHuman: …\\n\\nAssistant:`, then the response with its leading space. A
    transcript keeps its text unchanged."""
    user, assistant = f"{HUMAN} ", f"{ASSISTANT} "
    heads = {"system": "", "user": user, "text": user, "assistant": assistant}
    if style == "transcript":
        heads = {"system": "", "user": HUMAN, "text": "", "assistant": ASSISTANT}

    def prompt(turns: Sequence[Turn]) -> str:
        return "".join(heads[turn.role] + turn.text for turn in turns) + ASSISTANT

    def response(_prompt: str, _turns: Sequence[Turn], reply: str) -> str:
        return reply if style == "transcript" or reply[:1].isspace() else f" {reply}"

    return Template("hh", False, prompt, response)


def chat(tokenizer: Tokenizer, template: str, name: str) -> Template:
    """Return a jinja chat template over alternating messages (see `messages`).

    Its functions raise BadRow when the template refuses a row or leaves out its system turn, or
    when a finished turn differs from an open one. UserError for what is not jinja.
    """

    def render(chat: list[dict[str, str]], generation: bool) -> str:
        try:
            return tokenizer.render(chat, template, generation)
        except jinja2.TemplateSyntaxError as error:
            home = tokenizer.inner.name_or_path
            raise UserError(
                f"the chat template is not valid jinja: line {error.lineno}: {error}",
                where=f"chat template of {home}" if name == "chat" and home else "data.template",
                fix="correct it, or set data.template to hh, plain, chatml or a jinja template",
            ) from error
        except Exception as error:  # a template is a program: any error may come out of it
            raise BadRow(f"the chat template refuses it: {error}") from error

    def prompt(turns: Sequence[Turn]) -> str:
        chat = messages(turns)
        text = render(chat, True)
        systems = [tokenizer.spelled(m["content"]) for m in chat if m["role"] == "system"]
        if any(system not in text for system in systems):
            raise BadRow("the chat template leaves out the system turn")
        return text

    def response(opened: str, turns: Sequence[Turn], reply: str) -> str:
        chat = messages(turns)
        whole = render([*chat, {"role": "assistant", "content": reply.strip()}], False)
        if whole.startswith(opened):
            return whole[len(opened) :]
        closed = render(chat, False)
        opening = repr(opened[len(closed) :]) if opened.startswith(closed) else "other words"
        raise BadRow(
            "the chat template writes a finished turn otherwise than an opened one, which begins"
            f" with {opening}"
        )

    return Template(name, True, prompt, response)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the turns as alternating messages: without empty ones, neighbours of one role joined,
    text outside a turn given to the user."""
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
    """Return the template for an example of `style` (text | transcript | messages) under the
    recipe's `data.template`.

    auto: text -> plain; transcript -> hh; messages -> the tokenizer's chat template, or hh where it
    has none. Raises UserError for an unknown name, and for `chat` with a tokenizer that has no chat
    template.
    """
    if spec == "auto":
        by_messages = "chat" if tokenizer.chat_template else "hh"
        spec = {"text": "plain", "transcript": "hh", "messages": by_messages}[style]
    if spec == "hh" or (spec == "plain" and style == "transcript"):
        return hh(style)
    if spec == "plain":
        return plain()
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
    """Return the jinja text with which transformers' `apply_chat_template` gives the ids that an
    Encoder gives a prompt under `spec`.

    `style` is that of the rows, which decides `auto`. None where no such text exists: for plain,
    and for a tokenizer that cuts text after bos otherwise than text alone. Names of special tokens
    that a message spells out become ids there; training keeps them text. Raises UserError as
    `choose` does.
    """
    name = choose(spec, style, tokenizer).name
    if name == "hh":
        return _hh_jinja(tokenizer)
    texts = {"plain": None, "chatml": CHATML, "chat": tokenizer.chat_template, "jinja": spec}
    return texts[name]


def _hh_jinja(tokenizer: Tokenizer) -> str | None:
    """Return HH, with bos in front where the tokenizer adds one: `apply_chat_template` does not.

    Some tokenizers put a space before a text at the start, but not after bos. Then the template
    adds the space.
    """
    if not tokenizer.begins_with_bos:
        return HH
    user, system, assistant = Turn("user", "a"), Turn("system", "b"), Turn("assistant", "c")
    trials = ((user,), (system, user, assistant, user))
    expected = [
        [tokenizer.bos_id, *tokenizer.encode(hh("messages").prompt(turns))] for turns in trials
    ]
    for opening in ("{{ bos_token }}", "{{ bos_token + ' ' }}"):
        texts = [tokenizer.render(messages(turns), opening + HH, True) for turns in trials]
        if [tokenizer.encode(text, markup=True) for text in texts] == expected:
            return opening + HH
    return None


def parting(text: str, other: str, shown: int = 40) -> str:
    """Quote `text` on one line: whole when both texts are short, else from shortly before the first
    difference from `other`."""
    start = 0
    if max(len(text), len(other)) > shown:
        start = max(0, common_length(text, other) - shown // 2)
    end = start + shown
    return ("…" if start else "") + repr(text[start:end]) + ("…" if text[end:] else "")
