"""What a user gets wrong: exit code 2, one screen that names it, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gipo_megatron import cli
from gipo_megatron.data.tokenizer import byte_tokenizer
from tests.runs import chain

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
SCREEN = 25  # lines


Refuse = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refuse:
    """Start with these arguments; returns the message of exit code 2. No run folder may be
    there."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def start(arguments: list[str], seconds: float = 200) -> str:
        begun = time.monotonic()
        with pytest.raises(SystemExit) as left:
            cli.main(["train", *arguments])
        assert left.value.code == 2 and time.monotonic() - begun < seconds
        err = capsys.readouterr().err
        assert "Traceback" not in err and len(err.splitlines()) <= SCREEN
        assert not (tmp_path / "run").exists()
        return err

    return start


# ----------------------------------------------------------------------------------------- keys

KEYS = [
    (["models.actor.lrr=1"], ["models.actor.lrr: unknown key", "did you mean 'lr'?"]),
    (["run.steps=many"], ["run.steps: needs a whole number", "many"]),
    (["run.stepz=3", "batch.minibatch=large"], ["2 problems", "run.stepz", "batch.minibatch"]),
    (["batch.micro_batch=3"], ["batch.minibatch", "8 does not divide by data 1 × micro_batch 3"]),
    (["parallel.tensor=3"], ["tensor 3 × pipeline 1 × data ? ≠ world 1"]),
    (
        ["models.actor.load=runs/nothing/final"],
        ["models.actor.load: 'runs/nothing/final' is not on this machine"],
    ),
    (["run.resume=runs/nothing/step_1"], ["nothing to load at runs/nothing/step_1"]),
    (["plugins=[no_such_module]"], ["no_such_module"]),
]


@pytest.mark.parametrize(("words", "said"), KEYS, ids=lambda value: value[0])
def test_keys(refused: Refuse, tmp_path: Path, words: list[str], said: list[str]) -> None:
    error = refused(chain.sft(tmp_path / "run", *words))
    assert all(text in error for text in said), error


def test_folder_that_cannot_be_written(refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refused(chain.sft(tmp_path / "file" / "run"))
    assert "cannot write to" in error and "where: run.dir" in error


# ----------------------------------------------------------------------------------------- data


def rm_on(path: Path | str, tmp_path: Path, base: Path) -> list[str]:
    return chain.reward_model(
        tmp_path / "run",
        base / "sft",
        "data.format=preference",
        f"data.path={path}",
        "data.held_out=0.3",
        "data.max_length=96",
    )


PAIR = {"prompt": "Say a.", "chosen": "a", "rejected": "b"}
FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["the file holds no rows", "rows.jsonl"]),
    "no JSON": (
        json.dumps(PAIR).encode() + b'\n{"prompt": \n',
        ["unreadable JSON", "rows.jsonl line 2"],
    ),
    "no object": (
        json.dumps(PAIR).encode() + b"\n[1]\n",
        ["a JSON list, not an object", "rows.jsonl line 2"],
    ),
    "no UTF-8": (
        json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n',
        ["not UTF-8", "rows.jsonl line 2"],
    ),
    "other columns": (
        b'{"question": "a", "answer": "b"}\n',
        ["chosen", "found: question, answer", "data.columns"],
    ),
    "nothing kept": (
        json.dumps({**PAIR, "rejected": "a"}).encode() + b"\n",
        ["chosen equals rejected"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_data_files(refused: Refuse, tmp_path: Path, base: Path, name: str) -> None:
    content, said = FILES[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    error = refused(rm_on(tmp_path / "rows.jsonl", tmp_path, base))
    assert all(text in error for text in said), error


def test_hub_names_that_cannot_be_reached(
    refused: Refuse, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")  # nobody listens there any more
    error = refused(rm_on("nobody/nothing", tmp_path, base), seconds=30)
    assert "nobody/nothing" in error and "cannot be reached" in error and "give the folder" in error
    error = refused(chain.sft(tmp_path / "run", "models.actor.load=nobody/nothing"), seconds=30)
    assert (
        "nobody/nothing" in error and "cannot be reached" in error and "models.actor.load" in error
    )


def test_bad_rows_are_counted_and_dropped(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of the data's description that a loader must survive, among good ones."""
    head = "\n\nHuman: Name letter {}.\n\nAssistant:"
    good = [
        {"chosen": head.format(i) + f" It is {i}.", "rejected": head.format(i) + " No."}
        for i in range(40)
    ]
    one = head.format("x")
    bad = [
        {"chosen": one, "rejected": one + " b"},
        {"chosen": one + " a", "rejected": one + " "},
        {"chosen": one + " a", "rejected": head.format("y") + " b"},
        {"chosen": one + " a", "rejected": one + " a"},
        {"chosen": "a", "rejected": one + " a"},
        {"chosen": one + " a\n\nHuman: b", "rejected": one + " a"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad + good))
    assert cli.main(["train", *rm_on(tmp_path / "rows.jsonl", tmp_path, base)]) == 0
    said = capsys.readouterr().out
    assert (
        "dropped" in said
        and "empty response" in said
        and "different prompts" in said
        and "chosen equals rejected" in said
    ), said
    kept = [
        int(line.split("kept ")[1].split(" ")[0]) for line in said.splitlines() if "kept " in line
    ]
    assert sum(kept) == 40
    assert (tmp_path / "run" / "final").exists()


# ----------------------------------------------------------------------- checkpoints and tokenizers


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree((base / "sft" / "final").resolve(), tmp_path / "copy"))


def from_copy(copy: Path, *more: str) -> list[str]:
    return chain.sft(copy.parent / "run", f"models.actor.load={copy}", *more)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "file",
    ["actor/__0_0.distcp", "actor/.metadata", "actor/common.pt", "actor/metadata.json", "state.pt"],
)
def test_damaged_checkpoints(refused: Refuse, copy: Path, file: str) -> None:
    size = (copy / file).stat().st_size
    truncate(copy / file)
    assert f"damaged checkpoint: {file} has {size // 2} bytes, {size} were written" in refused(
        from_copy(copy)
    )
    (copy / file).unlink()
    assert f"damaged checkpoint: {file} is missing" in refused(from_copy(copy))
    assert str(copy) in refused(from_copy(copy, f"run.resume={copy}", "models.actor.load=random"))


def test_meta_that_cannot_be_read(refused: Refuse, copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    truncate(copy / "meta.json")
    assert "cannot read meta.json" in refused(from_copy(copy))
    (copy / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    assert "checkpoint version 99 is newer" in refused(from_copy(copy))
    (copy / "meta.json").unlink()
    assert "neither a checkpoint (meta.json) nor a Hugging Face folder" in refused(from_copy(copy))


def test_other_tokenizers_and_architectures(refused: Refuse, copy: Path, tmp_path: Path) -> None:
    inner = byte_tokenizer().inner
    inner.add_tokens([f"word{i}" for i in range(20)])
    inner.save_pretrained(tmp_path / "larger")
    assert "the model's vocabulary holds 259" in refused(
        from_copy(copy, f"model.tokenizer={tmp_path}/larger")
    )
    error = refused(from_copy(copy, "model.architecture.vocab_size=512"))
    assert (
        "model.architecture: another than that of the weights to load: vocab_size 512 ≠ 259"
        " (command line ≠ " in error
    )
    assert "no tokenizer at" in refused(from_copy(copy, f"model.tokenizer={tmp_path}/nothing"))
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "tokenizer": "of other text"}))
    error = refused(from_copy(copy))
    assert (
        "made with another tokenizer" in error
        and f"model.tokenizer={copy}/tokenizer" in error
        and "models.actor.load" in error
    )
    assert "made with another tokenizer" in refused(
        from_copy(copy, f"run.resume={copy}", "models.actor.load=random")
    )


def test_a_reward_model_is_no_actor(refused: Refuse, base: Path, tmp_path: Path) -> None:
    error = refused(from_copy(tmp_path / "copy", f"models.actor.load={base}/rm/final"))
    assert "no weights for 'actor': needs 'actor', the checkpoint has reward" in error


# ----------------------------------------------------------------------------- as started by a user


def test_one_start_alone(tmp_path: Path) -> None:
    """End to end, in one process of its own: a typo costs no start of Megatron."""
    done = chain.launch(chain.sft(tmp_path / "run", "run.stepz=3"), timeout=200)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "run").exists()
    assert "run.stepz: unknown key" in done.stderr and "Traceback" not in done.stderr


def only_ours(stderr: str) -> str:
    """Without torchrun's own summary of who failed."""
    kept = []
    for line in stderr.splitlines():
        if line.startswith(("W1", "W0", "E1", "E0")) and "torch/distributed" in line:
            break
        kept.append(line)
    return "\n".join(kept)


def start_two(arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    done = chain.launch(arguments, processes=2, timeout=timeout)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("exitcode  : 2 ") + done.stderr.count("exitcode: 2") >= 1
    return done


def test_a_world_that_does_not_factor(tmp_path: Path) -> None:
    done = start_two(chain.sft(tmp_path / "run", "parallel.tensor=3"), 100)
    # on a machine so busy that rank 0 is half a minute late, rank 1 prints it too, with its number
    screens = done.stderr.count("tiny/sft: ") - done.stderr.count("rank 1: tiny/sft: ")
    assert screens == 1
    assert "tensor 3 × pipeline 1 × data ? ≠ world 2: 2 is no multiple of 3" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_one_rank_alone_cannot_read_ends_all(base: Path, tmp_path: Path) -> None:
    """Rank 1 looks for its data in another place. Rank 0, which waits for it, says why, within
    seconds."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**PAIR, "prompt": f"Say {i}."}) + "\n" for i in range(40))
    )
    arguments = rm_on("${oc.env:ROWS}", tmp_path, base)
    file = tmp_path / "start.sh"
    file.write_text(
        f'[ "$RANK" = 1 ] && export ROWS={tmp_path}/gone.jsonl\nexec "$PYTHON" launch/train.py'
        ' "$@"\n'
    )
    environment = {
        **chain.environment(),
        "ROWS": str(tmp_path / "rows.jsonl"),
        "PYTHON": chain.python(1)[0],
    }
    command = [*chain.python(2), "--no-python", "bash", str(file), *arguments]
    done = subprocess.run(
        command,
        cwd=chain.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("nothing at") == 1 and f"{tmp_path}/gone.jsonl" in done.stderr
    assert 'gipo_megatron/cli.py", line' not in done.stderr  # no traceback of ours
    assert signal.SIGKILL.name not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
