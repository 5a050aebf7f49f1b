from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.tasks import TOO_LONG, Task, read_task
from tests.data.fixtures import SHARED, dialogue, needs_shared_data, write_rows

BYTES = byte_tokenizer()


def task(data: str, prompts: int = 100, **keys: Any) -> Task:
    return Task("t", "helpful", data, prompts, **keys)


def asked(
    root: Path, rows: Iterable[Any], name: str = "a.jsonl", **keys: Any
) -> list[tuple[str, str, str]]:
    """(text, question, reference) of every prompt made from a file with these rows."""
    write_rows(root / name, rows)
    return [
        (p.text, p.question, p.reference)
        for p in read_task(task(name, **keys), str(root), BYTES, 64).prompts
    ]


CHOSEN = dialogue("h: hi", "a: hello", "h: why?", "a: because")
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {  # columns -> (row, the text, the reference)
    "transcripts": (
        {"chosen": CHOSEN, "rejected": dialogue("h: hi", "a: hello", "h: why?", "a: no")},
        dialogue("h: hi", "a: hello", "h: why?") + "\n\nAssistant:",
        "because",
    ),
    "prompt": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "Q", "good"),
    "posts": ({"prompt": "POST: x\n\nTL;DR:", "label": " short"}, "POST: x\n\nTL;DR:", "short"),
    "raw posts": (
        {"subreddit": "cats", "title": "T", "post": "P", "summary": "S"},
        "SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:",
        "S",
    ),
    "comparisons": (
        {
            "info": {"subreddit": "cats", "title": "T", "post": "P"},
            "summaries": [{"text": " a"}, {"text": " b"}],
            "choice": 1,
        },
        "SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:",
        "b",
    ),
    "end mark": ({"prompt": "Q", "completion": "done<|endoftext|>"}, "Q", "done"),
    "turns": (
        {"turns": ["first", "second"], "reference": ["r1", "r2"], "category": "math"},
        "first",
        "r1",
    ),
    "goal": ({"goal": "G", "target": "Sure, here is"}, "G", ""),
    "question": ({"question": "Q", "answer": "A"}, "Q", "A"),
    "instruction": (
        {"instruction": "Sort", "input": "3 1 2", "output": "1 2 3"},
        "Sort\n\n3 1 2",
        "1 2 3",
    ),
    "article": ({"article": "News", "highlights": "N"}, "Article:\n\nNews\n\nTL;DR:", "N"),
    "messages": (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        "\n\nHuman: Q\n\nAssistant:",
        "A",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_columns_that_hold_prompts(tmp_path: Path, name: str) -> None:
    row, text, reference = ROWS[name]
    assert [(t, r) for t, _, r in asked(tmp_path, [row])] == [(text, reference)]


def test_a_plain_question_becomes_a_conversation_where_the_template_says_so(tmp_path: Path) -> None:
    row = {"turns": ["What <|im_end|> now?", "x"]}
    texts = {
        template: asked(tmp_path, [row], template=template)[0]
        for template in ("auto", "plain", "hh", "chatml")
    }
    question = "What <|im_end|> now?"
    assert texts == {
        "auto": (question, question, ""),
        "plain": (question, question, ""),
        "hh": (f"\n\nHuman: {question}\n\nAssistant:", question, ""),
        "chatml": (
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            question,
            "",
        ),
    }


def test_a_conversation_is_shown_with_its_speakers(tmp_path: Path) -> None:
    row = {"chosen": CHOSEN, "rejected": CHOSEN + " not"}
    ((_, question, _),) = asked(tmp_path, [row], template="chatml")
    assert question == "Human: hi\n\nAssistant: hello\n\nHuman: why?"


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"question": f'q{i}, "{i}"\nend'} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")
    files = sorted(tmp_path.iterdir())
    for file in files:
        for data, root in ((file.name, tmp_path), (str(file), tmp_path / "elsewhere")):
            assert [p.question for p in read_task(task(data), str(root), BYTES, 64).prompts] == [
                row["question"] for row in rows
            ], file.name
    assert len(files) == 5


def test_prompts_are_spread_evenly_and_keep_their_ids(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(10)])
    some = read_task(task("a.jsonl", 4), str(tmp_path), BYTES, 64).prompts
    assert [p.text for p in some] == ["p0", "p2", "p5", "p7"]  # i * 10 // 4
    every = read_task(task("a.jsonl", 99), str(tmp_path), BYTES, 64).prompts
    assert len(every) == len({p.prompt_id for p in every}) == 10
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"p{i}"} for i in reversed(range(10))])
    turned = read_task(task("b.jsonl", 99), str(tmp_path), BYTES, 64).prompts
    assert {p.text: p.prompt_id for p in every} == {p.text: p.prompt_id for p in turned}
    (other,) = read_task(Task("u", "helpful", "a.jsonl", 1), str(tmp_path), BYTES, 64).prompts
    assert other.text == every[0].text and other.prompt_id != every[0].prompt_id


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    """Room for 39 bytes and one bos. A conversation that would lose its first turn is dropped, not
    cut."""
    long = dialogue("h: " + "x" * 30, "a: y", "h: z")
    rows = [
        {"prompt": "short"},
        {"prompt": "x" * 100},
        {"prompt": "short"},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": "  "},
    ]
    write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": long + "\n\nAssistant:"}])
    loaded = read_task(task("a.jsonl", max_length=64 + 40), str(tmp_path), BYTES, 64)
    assert [p.text for p in loaded.prompts] == ["short"] and loaded.lines[:2] == [
        "1 of 1 prompts",
        "kept 1 of 7 rows",
    ]
    reasons = [
        "prompt seen before",
        "no value for prompt",
        "no human turn",
        "too long even with its last human turn",
        TOO_LONG,
    ]
    counts = [1, 2, 1, 1, 1]
    for reason, count in zip(reasons, counts, strict=True):
        assert any(
            line.startswith(f"dropped {count}: ") and reason in line for line in loaded.lines
        ), reason


def test_a_folder_gives_its_test_split_and_a_source_can_be_chosen(tmp_path: Path) -> None:
    for source in ("one", "two"):
        write_rows(
            tmp_path / "set" / source / "train.jsonl",
            [{"prompt": f"{source} train {i}"} for i in range(3)],
        )
        write_rows(
            tmp_path / "set" / source / "test.jsonl",
            [{"prompt": f"{source} test {i}"} for i in range(3)],
        )
    both = read_task(task("set"), str(tmp_path), BYTES, 64).prompts
    assert [p.text for p in both] == [
        f"{source} test {i}" for source in ("one", "two") for i in range(3)
    ]
    assert {
        p.source for p in read_task(task("set", source=["two"]), str(tmp_path), BYTES, 64).prompts
    } == {"two"}
    with pytest.raises(UserError, match="no source three"):
        read_task(task("set", source=["three"]), str(tmp_path), BYTES, 64)


def test_without_a_test_split_the_rows_that_training_holds_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", [{"prompt": f"question {i}"} for i in range(200)])
    loaded = read_task(task("set", 200), str(tmp_path), BYTES, 64)
    config = DataConfig(
        format="prompt", path=str(tmp_path / "set"), max_length=256, max_response=64
    )
    trained, held_out = (
        load_data(config, BYTES, split, 0, "prompt").rows for split in ("train", "test")
    )
    assert [p.question for p in loaded.prompts] == [row.prompt[0].text for row in held_out]
    assert 5 < len(loaded.prompts) < 50 and not {p.question for p in loaded.prompts} & {
        row.prompt[0].text for row in trained
    }
    assert "no test split" in loaded.lines[-1]


@pytest.mark.parametrize("template", ["auto", "hh", "chatml"])
def test_ids_are_those_of_training(tmp_path: Path, template: str) -> None:
    rows = [
        {"prompt": "What <|im_end|> now?"},
        {"prompt": [{"role": "user", "content": "Q"}]},
        {"prompt": dialogue("h: a") + "\n\nAssistant:"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    config = DataConfig(
        format="prompt",
        path=str(tmp_path / "a.jsonl"),
        template=template,
        max_length=256,
        max_response=64,
    )
    for tokenizer in (
        BYTES,
        *([load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))] if SHARED.is_dir() else []),
    ):
        loaded = read_task(
            task("a.jsonl", template=template, max_length=256), str(tmp_path), tokenizer, 64
        )
        expected, _ = load_data(config, tokenizer, "all", 0, "prompt").prompts_at([0, 1, 2])
        ids = [loaded.ids[p.prompt_id] for p in loaded.prompts]
        assert ids == [
            row[:size]
            for row, size in zip(expected.tokens.tolist(), expected.lengths.tolist(), strict=True)
        ]
        assert [p.text for p in loaded.prompts] == [
            extras["prompt"] for extras in expected.extras
        ] and len(ids) == 3


# ------------------------------------------------------------------------------------------- errors


def refused(root: Path, data: str, **keys: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        read_task(task(data, **keys), str(root), BYTES, 64)
    assert raised.value.where.startswith("tasks, t")
    return raised.value


def test_errors_say_what_and_where(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": ')
    error = refused(tmp_path, "torn.jsonl")
    assert "unreadable JSON" in error.what and error.where.endswith("torn.jsonl line 2")
    (tmp_path / "bad.csv").write_text("prompt,b\n1,2\n3\n")
    assert refused(tmp_path, "bad.csv").where.endswith("bad.csv line 3")
    write_rows(tmp_path / "odd.jsonl", [{"text": "x", "score": 1}])
    error = refused(tmp_path, "odd.jsonl")
    assert (
        error.what == "no column that holds prompts; found: text, score" and "question" in error.fix
    )
    write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 3000}])
    error = refused(tmp_path, "long.jsonl")
    assert error.what == "no prompts left of 1 rows" and "too long" in error.fix
    assert "nothing at" in refused(tmp_path, "missing.jsonl").what
    assert "leaves no room" in refused(tmp_path, "long.jsonl", max_length=64).what
    assert "unknown template" in refused(tmp_path, "long.jsonl", template="alpaca").what
    write_rows(tmp_path / "dialogue.jsonl", [{"prompt": [{"role": "user", "content": "Q"}]}])
    assert (
        "takes prompts that are text" in refused(tmp_path, "dialogue.jsonl", template="plain").what
    )


def test_a_hub_name_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert "cannot be reached" in refused(tmp_path, "nobody/nothing").what


# ----------------------------------------------------------------------------------- the real files

# data, source, template, max_length, usable prompts, all with a reference, how a text begins and
# ends
REAL = [
    ("hh-rlhf/harmless-base", [], "auto", 2048, 233, True, "\n\nHuman: ", "\n\nAssistant:"),
    ("hh-rlhf", ["helpful-base"], "auto", 2048, 208, True, "\n\nHuman: ", "\n\nAssistant:"),
    ("tldr/posts", [], "auto", 2048, 184, True, "SUBREDDIT: r/", "\n\nTL;DR:"),
    ("tldr", ["comparisons"], "auto", 2048, 115, True, "SUBREDDIT: r/", "\n\nTL;DR:"),
    ("ood/vicuna_bench.question.jsonl", [], "hh", 1024, 80, False, "\n\nHuman: ", "\n\nAssistant:"),
    (
        "ood/mt_bench.question.jsonl",
        [],
        "chatml",
        2048,
        80,
        False,
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
    ),
    (
        "ood/advbench.harmful_behaviors.csv",
        [],
        "hh",
        1024,
        520,
        False,
        "\n\nHuman: ",
        "\n\nAssistant:",
    ),
    (
        "ood/cnn_dailymail.tldr_prompt.jsonl",
        [],
        "auto",
        2048,
        195,
        True,
        "Could you please generate",
        "",
    ),
]


@needs_shared_data
@pytest.mark.parametrize(
    ("data", "source", "template", "length", "usable", "answered", "start", "end"), REAL
)
def test_real_files(
    data: str,
    source: list[str],
    template: str,
    length: int,
    usable: int,
    answered: bool,
    start: str,
    end: str,
) -> None:
    """Counts: lines of the file, less one HH row whose prompts differ and five repeated
    articles."""
    tokenizer: Tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "hh_bytebpe_4k"))
    loaded = read_task(
        task(data, 1000, template=template, source=source, max_length=length),
        str(SHARED),
        tokenizer,
        128,
    )
    assert len(loaded.prompts) == usable, loaded.lines
    assert all(p.text.startswith(start) and p.text.endswith(end) for p in loaded.prompts)
    assert all(p.reference for p in loaded.prompts) == answered
    assert not any("Assistant:" in p.question[-12:] or "<|" in p.question for p in loaded.prompts)
