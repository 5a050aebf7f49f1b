"""The server's process: it ends with the trainer however that ends, and a failed start ends in one
screen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.serving.client import Client
from gipo_megatron.serving.process import PLUGIN, ServerProcess, environment, free_port
from gipo_megatron.specs import Serve

FAKE = Path(__file__).with_name("fake.py")
# its child leaves the process group, as a worker may
SERVER = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
sys.argv[0] = {str(FAKE)!r}
exec(open(sys.argv[0]).read())
"""
PARENT = """
import signal, sys, time
from pathlib import Path
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.specs import Serve
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, log = map(Path, sys.argv[1:3])
server = ServerProcess(Serve(command=sys.argv[3:]), folder, log, "float32", 64)
print(server.start(), flush=True)
time.sleep(100)
"""


@dataclass
class Marked:
    """Processes that inherit a variable of this test, this one aside."""

    mark: str = field(default_factory=lambda: f"GIPO_TEST_MARK={os.getpid()}_{time.monotonic_ns()}")

    def find(self) -> dict[int, str]:
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark.encode() in variables and state != "Z" and path.name != str(os.getpid()):
                found[int(path.name)] = words
        return found

    def wait_for_none(self) -> None:
        until = time.monotonic() + 60
        while (left := self.find()) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    found = Marked()
    name, value = found.mark.split("=")
    monkeypatch.setenv(name, value)
    yield found
    for process in found.find():
        os.kill(process, signal.SIGKILL)


def process(folder: Path, log: Path, *command: str, **keys: object) -> ServerProcess:
    serve = Serve(command=list(command), **keys)  # type: ignore[arg-type]
    return ServerProcess(serve, folder, log, "float32", 64)


def fake(*more: str) -> list[str]:
    return [sys.executable, "-c", SERVER, "--model", "{model}", "--port", "{port}", *more]


def test_start_stop_and_start_again(folder: Path, tmp_path: Path, marked: Marked) -> None:
    """A server that died is started again by the same object; the log holds both."""
    server = process(folder, tmp_path / "run" / "server.log", *fake())
    assert not server.alive() and server.last_lines() == ""
    first = server.start()
    assert server.alive()
    client = Client(first, 10)
    assert client.get("/v1/models")["data"][0]["root"] == str(folder)
    running = marked.find()
    assert len(running) == 3  # watchdog, server, its child
    (pid,) = [pid for pid, words in running.items() if "--port" in words and "-I" not in words]
    os.kill(pid, signal.SIGKILL)
    marked.wait_for_none()
    assert not server.alive()
    server.stop()
    second = server.start()
    assert second != first and server.alive()
    assert server.last_lines() == "fake server starts"
    first_log, killed, second_log = server.log.read_text().splitlines()
    assert first_log == second_log == "fake server starts" and "SIGKILL" in killed
    server.stop()
    assert not server.alive() and not marked.find()
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_parent(
    folder: Path, tmp_path: Path, marked: Marked, number: signal.Signals
) -> None:
    log = tmp_path / "server.log"
    command = [sys.executable, "-c", PARENT, str(folder), str(log), *fake()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith(b"http://127.0.0.1:")
        assert len(marked.find()) == 4
        parent.send_signal(number)
    assert parent.returncode == -number
    marked.wait_for_none()


def test_the_server_ends_with_its_watchdog(folder: Path, tmp_path: Path, marked: Marked) -> None:
    server = process(folder, tmp_path / "log", sys.executable, str(FAKE), *fake()[3:])
    server.start()
    (watchdog,) = [pid for pid, words in marked.find().items() if " -I " in words]
    os.kill(watchdog, signal.SIGKILL)
    marked.wait_for_none()
    server.stop()


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "serve.python"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "serve.gpu_memory"),
        ("ValueError: Free memory on device (1/80 GiB) on startup is less than desired GPU memory"
         " utilization (0.9, 72 GiB).", "serve.gpu_memory"),
        ("api_server.py: error: unrecognized arguments: --nothing", "serve.args"),
        ("ValueError: something else", "read the log"),
    ],
)  # fmt: skip
def test_a_failed_start_shows_the_logs_errors_and_its_end(
    folder: Path, tmp_path: Path, marked: Marked, output: str, fix: str
) -> None:
    """As vLLM writes them: three times, with a prefix, above much else."""
    code = f"""
for i in range(3):
    print("Traceback (most recent call last):")
    print("(EngineCore pid=12) ERROR 11-29 01:33:36 [core.py:1750] " + {output!r})
for i in range(100):
    print("line", i)
raise SystemExit(3)
"""
    server = process(folder, tmp_path / "log", sys.executable, "-S", "-c", code)
    with pytest.raises(UserError) as error:
        server.start()
    assert fix in error.value.fix and error.value.where == str(tmp_path / "log")
    assert error.value.what.splitlines() == [
        "vLLM's server ended while it started",
        "  errors in its log:",
        f"    {output}",
        "  last lines of its log:",
        *(f"    line {i}" for i in range(90, 100)),
    ]
    assert not server.alive() and not marked.find()


def test_a_server_that_the_kernel_ended(folder: Path, tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    server = process(folder, tmp_path / "log", sys.executable, "-S", "-c", code)
    with pytest.raises(UserError, match="ended by SIGKILL") as error:
        server.start()
    assert "serve.gpu_memory" in error.value.fix


def test_a_python_without_vllm(folder: Path, tmp_path: Path) -> None:
    server = ServerProcess(Serve(python=sys.executable), folder, tmp_path / "log", "float32", 64)
    with pytest.raises(UserError, match="No module named 'vllm'") as error:
        server.start()
    assert "serve.python" in error.value.fix


def test_a_start_that_takes_too_long(folder: Path, tmp_path: Path, marked: Marked) -> None:
    code = "import time; print('loading', flush=True); time.sleep(100)"
    command = (sys.executable, "-S", "-c", code)
    server = process(folder, tmp_path / "log", *command, start_timeout=0.5)
    with pytest.raises(UserError, match=r"not ready within .*start_timeout, 0\.5 s"):
        server.start()
    assert not server.alive() and not marked.find()


def test_a_port_that_is_taken(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = process(folder, tmp_path / "log", *fake(), port=port)
        with pytest.raises(UserError, match=f"port {port} is taken") as error:
            server.start()
    assert error.value.where == "algorithm.rollout.serve.port"


def test_a_free_port_that_another_program_takes_meanwhile(
    folder: Path, tmp_path: Path, marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is tried."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = iter([other.getsockname()[1], free_port()])
        monkeypatch.setattr("gipo_megatron.serving.process.free_port", lambda: next(ports))
        monkeypatch.setattr("gipo_megatron.serving.process.is_free", lambda port: True)
        # the other program is no server: it accepts and does not answer
        monkeypatch.setattr("gipo_megatron.serving.client.CONNECT", 0.1)
        server = process(folder, tmp_path / "log", *fake())
        assert server.start().startswith("http://127.0.0.1:")
        assert not list(ports)
        server.stop()
    assert "Address already in use" in server.log.read_text()


def test_no_program_is_a_users_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    server = ServerProcess(Serve(), folder, tmp_path / "log", "float32", 64)
    with pytest.raises(UserError, match="no Python with vLLM") as error:
        server.start()
    assert "VLLM_PYTHON" in error.value.fix
    monkeypatch.setenv("VLLM_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no program"):
        server.start()
    with pytest.raises(UserError, match="no program") as error:
        process(folder, tmp_path / "log", str(tmp_path / "none")).start()
    assert error.value.where == "algorithm.rollout.serve.command"


def test_the_command_of_vllm(folder: Path, tmp_path: Path) -> None:
    serve = Serve(python=sys.executable, tensor_parallel=2, gpu_memory=0.25, args=["--seed", "3"])
    words = ServerProcess(serve, folder, tmp_path / "log", "bfloat16", 640).command(8000)
    assert words[0] == sys.executable and words[-2:] == ["--seed", "3"]
    pairs = dict(pairwise(words))
    for name, value in {
        "--model": str(folder),
        "--port": "8000",
        "--dtype": "bfloat16",
        "--max-model-len": "640",
        "--tensor-parallel-size": "2",
        "--gpu-memory-utilization": "0.25",
        "--load-format": "dummy",
    }.items():
        assert pairs[name] == value
    given = Serve(command=[sys.executable, "-m={model}:{port}", "{plugin}", "{other}"])
    words = ServerProcess(given, folder, tmp_path / "log", "float32", 64).command(8000)
    assert words == [sys.executable, f"-m={folder}:8000", str(PLUGIN), "{other}"]


def test_the_environment_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's world and the trainer's Python stay out; all else is inherited."""
    left_out = (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_RUN_ID", "PYTHONHOME", "PYTHONWARNINGS"),
    )
    for name in (*left_out, "HF_HUB_OFFLINE", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "MY_RANKING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("PYTHONPATH", "/of/the/trainer")
    found = environment("")
    assert not found.keys() & set(left_out)
    assert found["PYTHONPATH"] == str(PLUGIN) and PLUGIN.name == "plugin"
    assert found["VLLM_SERVER_DEV_MODE"] == "1"
    kept = ("HF_HUB_OFFLINE", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "MY_RANKING")
    assert {found[name] for name in kept} == {"0"}
    assert environment("2,3")["CUDA_VISIBLE_DEVICES"] == "2,3"
