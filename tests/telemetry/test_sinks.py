from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.telemetry.loggers import TensorBoard, make_sinks
from gipo_megatron.telemetry.sinks import Jsonl

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_are_always_written_and_flushed(tmp_path: Path) -> None:
    sinks = make_sinks([], tmp_path / "run", 5, name="run", headline=(), config={})
    for sink in sinks:
        sink.log(
            1, {"kl/mean": 0.1 + 0.2, "groups/auc": float("nan"), "policy/ratio_max": float("inf")}
        )
        sink.samples(1, [{"prompt": "Ä\n\u2028", "response": "\ud800", "score": float("nan")}])
        sink.alert(1, "step 1: careful")
        sink.phase("rollout")
    # before any close
    assert lines(tmp_path / "run/metrics.jsonl") == [
        {"step": 1, "kl/mean": 0.30000000000000004, "groups/auc": None, "policy/ratio_max": None}
    ]
    sample = json.loads((tmp_path / "run/samples.jsonl").read_bytes())
    assert sample == {"step": 1, "prompt": "Ä\n\u2028", "response": "\\ud800", "score": None}
    assert lines(tmp_path / "run/alerts.jsonl") == [{"step": 1, "message": "step 1: careful"}]
    assert "step 1/5" in (tmp_path / "run/log.txt").read_text()
    for sink in sinks:
        sink.close()


def filled(folder: Path) -> Jsonl:
    sink = Jsonl(folder)
    sink.log(0, {"eval/score": 0.5})  # evaluated before the first step
    for step in (1, 2, 3):
        sink.log(step, {"x": step / 3})
        sink.samples(step, [{"response": "a"}, {"response": "b"}])
        sink.samples(step, [{"response": "c"}], "held_out")
        sink.alert(step, "!")
    sink.close()
    return sink


def test_resume_cuts_later_rows_and_a_half_written_line(tmp_path: Path) -> None:
    filled(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x": 1.3')
    sink = Jsonl(tmp_path)
    sink.resume(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3])
    sink.log(3, {"x": 7.0})
    sink.close()
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2]
    assert lines(tmp_path / "held_out.jsonl") == [{"step": s, "response": "c"} for s in (1, 2)]
    assert [row["step"] for row in lines(tmp_path / "alerts.jsonl")] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alerts.jsonl",
        "held_out.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
    ]


def test_resume_at_zero_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path).resume(0)
    assert (
        (tmp_path / "metrics.jsonl").read_bytes()
        == b""
        == (tmp_path / "samples.jsonl").read_bytes()
    )
    Jsonl(tmp_path / "nothing there").resume(5)


def test_resume_names_an_unreadable_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError) as error:
        Jsonl(tmp_path).resume(2)
    assert error.value.where.endswith("metrics.jsonl:2")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3  # untouched


def test_unknown_logger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tensorbord'") as error:
        loggers = ["console", "tensorbord"]
        make_sinks(loggers, tmp_path / "run", 5, name="run", headline=(), config={})
    assert "did you mean 'tensorboard'?" in error.value.fix and "wandb" in error.value.fix
    assert not (tmp_path / "run").exists()


def test_tensorboard_hides_what_the_resume_cut(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"kl/mean": float(step)})
    first.samples(3, [{"prompt": "p", "response": "<b>"}])
    first.close()
    second = TensorBoard(tmp_path)
    second.resume(1)
    second.log(2, {"kl/mean": 20.0})
    second.alert(2, "careful")
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl/mean")] == [(1, 1.0), (2, 20.0)]


WANDB_RUN = """
import sys
from gipo_megatron.telemetry.loggers import make_sinks
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = {"run": {"seed": 1}}
sinks = make_sinks(["wandb"], folder, 4, name="run", headline=(), config=config)
for sink in sinks:
    sink.resume(first - 1)
    for step in range(first, last + 1):
        sink.log(step, {"kl/mean": step / 2})
        sink.samples(step, [{"prompt": "p", "response": "r"}])
        sink.alert(step, "!")
    sink.close()
"""


def wandb_steps(path: Path) -> tuple[str, list[int]]:
    """Run id and history steps of an offline file: LevelDB log framing (7-byte header; blocks of 32
    KiB) around protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, run_id, steps = path.read_bytes(), 7, b"", "", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            parsed = Record.FromString(record)
            record = b""
            run_id = parsed.run.run_id or run_id
            if parsed.HasField("history"):
                steps.append(parsed.history.step.num)
    return run_id, steps


def test_wandb_offline_without_login_inside_the_folder_and_continued(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    environment = clean | {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for first, last in ((1, 3), (3, 4)):
        command = [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run"), str(first), str(last)]
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    files = sorted(
        (tmp_path / "run").glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns
    )
    known = (tmp_path / "run/wandb_id").read_text().strip()
    assert [wandb_steps(f) for f in files] == [(known, [1, 2, 3]), (known, [3, 4])]
    assert not list(home.rglob("*"))
