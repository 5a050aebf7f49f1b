"""Tasks: prompts for the comparison of policies, held out or out of domain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, islice
from pathlib import Path
from typing import Annotated, Any

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import BadRow, Example, Tally, Turn
from gipo_megatron.data.hub import is_hub_name
from gipo_megatron.data.rows import HEAD_ROWS
from gipo_megatron.data.schemas import END_MARK, Schema
from gipo_megatron.data.sources import Source, open_sources
from gipo_megatron.data.splits import divide, label_of_row
from gipo_megatron.data.templates import choose
from gipo_megatron.data.tldr import POST, PROMPT
from gipo_megatron.data.tokenizer import Tokenizer, unspelled
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.types import KINDS, TaskPrompt
from gipo_megatron.specs import OneOf, PathText, Range, Size

# preference rows: HH's and TRL's, OpenAI's comparisons
PAIRS = (("chosen", "rejected"), ("info", "summaries", "choice"))
# columns that hold a prompt; the first one found counts
QUESTIONS = ("prompt", "question", "instruction", "turns", "goal", "messages", "article")
REFERENCES = (
    "response", "completion", "label", "summary", "reference", "answer", "output", "highlights",
)  # fmt: skip
ARTICLE_PROMPT = "Article:\n\n{article}\n\nTL;DR:"  # of OpenAI's code, like tldr.PROMPT
SPEAKERS = {"system": "System: ", "user": "Human: ", "assistant": "Assistant: ", "text": ""}
TOO_LONG = "longer than max_length - max_response tokens: turns would be lost from the front"


@dataclass
class Task:
    """A set of prompts and the criterion of its responses: an entry of the recipe's `tasks`."""

    name: str
    kind: Annotated[str, OneOf(*KINDS)]
    data: PathText  # a path under data_root, an absolute path, or a hub name
    prompts: Size  # at most; evenly spread over the test split
    template: str = "auto"  # auto | chat | hh | plain | chatml | a jinja chat template
    # sub-folders (hub: configurations) to read; [] = all
    source: list[str] = field(default_factory=list)
    max_length: Annotated[int, Range(2)] = 1024  # tokens of prompt + response


@dataclass(frozen=True)
class LoadedTask:
    """`ids`: prompt_id -> tokens, encoded as in training. `lines`: rows kept, dropped and why."""

    prompts: list[TaskPrompt]
    ids: dict[str, list[int]]
    lines: list[str]


def read_task(task: Task, data_root: str, tokenizer: Tokenizer, max_response: int) -> LoadedTask:
    """Return `task.prompts` prompts of the test split, evenly spread over its usable rows.

    A single file is read whole. Without a test split, the rows that training holds back by default
    are used. Raises UserError if the data are missing or unreadable (file and line), if no column
    holds a prompt (with the columns' names), or if no prompt is left.
    """
    try:
        return _read_task(task, data_root, tokenizer, max_response)
    except UserError as error:
        where = f"tasks, {task.name}" + (f": {error.where}" if error.where else "")
        raise UserError(error.what, where=where, fix=error.fix) from error


def _read_task(task: Task, data_root: str, tokenizer: Tokenizer, max_response: int) -> LoadedTask:
    config = DataConfig(
        format="prompt",
        template=task.template,
        max_length=task.max_length,
        max_response=max_response,
    )
    encoder, tally, notes = Encoder(config, tokenizer), Tally(), []
    found: dict[str, tuple[TaskPrompt, list[int]]] = {}
    path = _locate(task.data, data_root)
    whole = Path(path).is_file()
    rows = f"the rows held back by a hash are used ({config.held_out:g} of them)"
    for source in open_sources(path, list(task.source), "test", "prompt"):
        if not source.split:
            notes.append(
                f"{source.name} has no test split: {'all rows are used' if whole else rows}; held"
                " out only if no model was trained on them"
            )
        for where, example, reference in _examples(
            source, tally, not (source.split or whole), config.held_out
        ):
            try:
                prompt, ids = _prompt(task, example, reference, encoder, tally.read)
                if prompt.prompt_id in found:
                    raise BadRow("prompt seen before")
            except BadRow as reason:
                tally.drop(str(reason), where)
                continue
            tally.kept += 1
            found[prompt.prompt_id] = prompt, ids
    if not found:
        raise UserError(
            f"no prompts left of {tally.read} rows", where=path, fix="; ".join(tally.lines()[1:])
        )
    usable = list(found.values())
    count = min(task.prompts, len(usable))
    chosen = [usable[i * len(usable) // count] for i in range(count)]
    lines = [f"{count} of {len(usable)} prompts", *tally.lines(), *notes]
    return LoadedTask(
        [prompt for prompt, _ in chosen], {prompt.prompt_id: ids for prompt, ids in chosen}, lines
    )


def _locate(data: str, data_root: str) -> str:
    """Return an absolute path, else a path under data_root, else a hub name."""
    local = Path(data_root) / data
    return data if is_hub_name(data) and not local.exists() and not local.suffix else str(local)


def _examples(
    source: Source, tally: Tally, only_held_out: bool, share: float
) -> Iterator[tuple[str, Example, str]]:
    """Yield (place, example, reference response or "") of every clean row."""
    rows = iter(source.rows)
    head = list(islice(rows, HEAD_ROWS))
    reader = _Reader([row for _, row in head], source.name)
    found, labels = [], []
    for where, row in chain(head, rows):
        try:
            example, reference = reader.read(row, tally, where)
        except BadRow as reason:
            tally.drop(str(reason), where)
            continue
        found.append((where, example, reference))
        labels.append(label_of_row(row))
    if not only_held_out:
        yield from found
        return
    held_out = divide(labels, [example.prompt for _, example, _ in found], share)
    yield from compress(found, held_out)


class _Reader:
    """Read rows of one source: their layout is decided once by the columns of its first rows.

    Raises UserError if no column is known to hold a prompt.
    """

    def __init__(self, head: Sequence[dict[str, Any]], source: str) -> None:
        columns = [name for row in head for name, value in row.items() if value is not None]
        found = list(dict.fromkeys(columns))
        self.source = source
        self.pairs = any({*names} <= {*found} for names in PAIRS)
        self.post = {*POST} <= {*found} and "prompt" not in found
        self.column = next((name for name in QUESTIONS if name in found), "")
        if not (self.pairs or self.post or self.column):
            needs = (
                f"one of {', '.join(QUESTIONS)}, or {' + '.join(POST)}, or {' + '.join(PAIRS[0])}"
            )
            raise UserError(
                f"no column that holds prompts; found: {', '.join(found)}",
                where=source,
                fix=f"name the column {needs}",
            )
        format, rows = ("preference", head) if self.pairs else ("prompt", [{"prompt": ""}])
        self.schema = Schema(format, {}, rows, source)

    def read(self, row: dict[str, Any], tally: Tally, where: str) -> tuple[Example, str]:
        """Return the example and its reference response. Raises BadRow."""
        if self.pairs:
            example = self.schema.read(row, self.source, tally, where)
            return example, example.responses[0]
        value: Any = self._post(row) if self.post else self._question(row)
        reference = _reference(row)
        last = value[-1] if self.column == "messages" else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            value, reference = value[:-1], str(last.get("content", ""))
        return self.schema.read({"prompt": value}, self.source, tally, where), reference

    def _post(self, row: dict[str, Any]) -> str:
        if not all(isinstance(row.get(name), str) for name in POST):
            raise BadRow("not a Reddit post")
        return PROMPT.format(**{name: row[name] for name in POST})

    def _question(self, row: dict[str, Any]) -> Any:
        value = row.get(self.column)
        if isinstance(value, list) and value and isinstance(value[0], str):
            value = value[0]  # of a benchmark's turns, the only one without a response before it
        if not isinstance(value, str | list) or not value:
            raise BadRow(f"no value for {self.column}")
        if self.column == "article":
            return ARTICLE_PROMPT.format(article=value)
        more = row.get("input") if self.column == "instruction" else None
        if isinstance(value, str) and isinstance(more, str) and more.strip():
            return f"{value}\n\n{more}"
        return value


def _reference(row: dict[str, Any]) -> str:
    """Return the data set's own response, or ""."""
    for name in REFERENCES:
        value = row.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value.strip().removesuffix(END_MARK)
    return ""


def _prompt(
    task: Task, example: Example, reference: str, encoder: Encoder, row: int
) -> tuple[TaskPrompt, list[int]]:
    """Return the prompt and its tokens. Raises BadRow if the template refuses it or it is cut."""
    encoder.check(example)
    ids, text = encoder.prompt(example, row)
    template = choose(task.template, example.style, encoder.tokenizer)
    if text != unspelled(template.prompt(example.prompt)):
        raise BadRow(TOO_LONG)
    prompt_id = hashlib.sha256(f"{task.name}\0{text}".encode()).hexdigest()[:16]
    question = _question(example.prompt)
    prompt = TaskPrompt(
        task.name, task.kind, prompt_id, text, question, example.source, reference.strip()
    )
    return prompt, ids


def _question(turns: Sequence[Turn]) -> str:
    """Return the conversation for readers: a single turn alone, several with their speakers."""
    spoken = [turn for turn in turns if turn.text.strip()]
    if len(spoken) == 1:
        return spoken[0].text.strip()
    return "\n\n".join(SPEAKERS[turn.role] + turn.text.strip() for turn in spoken)
