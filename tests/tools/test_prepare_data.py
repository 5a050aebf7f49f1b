from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gipo_megatron.commands.prepare_data import main, read_arguments
from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import dialogue, write_rows

ROOT = Path(__file__).parents[2]
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


def rows(config: DataConfig, split: str, kind: str) -> list[tuple]:
    return [
        (e.style, e.prompt, e.responses, e.extras)
        for e in load_data(config, byte_tokenizer(), split, 0, kind).rows
    ]


@pytest.mark.parametrize(
    ("format", "good"),
    [
        (
            "preference",
            [
                {
                    "chosen": dialogue("h: q", "a: x", "h: r", f"a: {i}"),
                    "rejected": dialogue("h: q", "a: x", "h: r", "a: z"),
                }
                for i in range(3)
            ],
        ),
        ("preference", [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "stars": 3}]),
        ("preference", [{"prompt": "q", "chosen": " a", "rejected": " b"}]),
        ("sft", [{"messages": [USER, GOOD, USER, BAD]}]),
        ("prompt", [{"prompt": dialogue("h: q") + "\n\nAssistant:"}]),
    ],
)
def test_cleaned_files_are_read_back_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, good: list[dict]
) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / "in" / "s" / f"{split}.jsonl", [*good, dict.fromkeys(good[0], "")])
    main([f"data.path={tmp_path / 'in'}", f"data.format={format}", f"out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert (
        f"kept {len(good)} of {len(good) + 1} rows" in printed
        and "dropped 1" in printed
        and "prompt tokens: 50%" in printed
    )
    for split in ("train", "test"):
        read = [
            rows(DataConfig(format=format, path=str(tmp_path / place)), split, format)
            for place in ("in", "out")
        ]
        assert read[0] == read[1] and len(read[0]) == len(good)
    assert not list(tmp_path.rglob("*.part"))


def test_planted_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "planted",
            f"out={tmp_path}",
            "data.planted.prompts=20",
            "data.max_length=48",
            "data.max_response=12",
        ]
    )
    assert (
        len(list(tmp_path.rglob("*.jsonl"))) == 12
        and "source hard: 48 rows" in capsys.readouterr().out
    )
    row = json.loads((tmp_path / "preference" / "hard" / "test.jsonl").read_text().split("\n")[0])
    assert row.keys() == {"prompt", "chosen", "rejected", "gold_chosen", "gold_rejected", "group"}


@pytest.mark.parametrize(
    "argument", ["path=x", "data.pth=x", "data.max_length=long", "--help", "data.path"]
)
def test_arguments_that_are_none(argument: str) -> None:
    with pytest.raises(UserError):
        read_arguments([argument])


def test_an_error_is_one_screen_and_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(
        gzip.compress(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    )
    command = [
        sys.executable,
        "tools/prepare_data.py",
        f"data.path={file}",
        f"out={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "unreadable JSON" in done.stderr and f"{file} line 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_what_is_shown_and_read(tmp_path: Path) -> None:
    """Mapped columns beside others of our names; sources that would leave the folder or mark a
    split; no test rows."""
    sources = ["../x", "a/b", "my tests", "\udcff", None]
    given = [
        {"q": f"q{i}", "a": "yes", "prompt": "no", "response": "no", "who": who, "n": 2**70}
        for i, who in enumerate(sources)
    ]
    write_rows(tmp_path / "in" / "rows.jsonl", given)
    main(
        [
            f"data.path={tmp_path / 'in'}",
            f"out={tmp_path / 'out'}",
            "data.format=sft",
            "data.columns={prompt: q, response: a, source: who}",
            "data.held_out=0",
        ]
    )
    files = sorted(str(f.relative_to(tmp_path)) for f in (tmp_path / "out").rglob("*.jsonl"))
    assert files == [
        "out/a%2Fb/train.jsonl",
        "out/in/train.jsonl",
        "out/rows/train.jsonl",
    ]
    config = DataConfig(format="sft", path=str(tmp_path / "out"), held_out=0.0)
    read = rows(config, "train", "sft")
    assert sorted(prompt[0].text for _, prompt, _, _ in read) == ["q0", "q1", "q2", "q4"]
    assert all(responses == ("yes",) and extras == {"n": 2**70} for *_, responses, extras in read)
