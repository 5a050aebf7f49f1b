"""vLLM's server as a process of rank 0: started, watched, stopped."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent

from gipo_megatron.errors import UserError
from gipo_megatron.files import user_errors
from gipo_megatron.serving import watchdog
from gipo_megatron.serving.client import LOGPROBS, SCALE_OUT, Client
from gipo_megatron.specs import Serve

PLUGIN = Path(__file__).with_name("plugin")  # the folder that is the server's PYTHONPATH
MODEL_NAME = "policy"
WHERE = "algorithm.rollout.serve"
TICK = 0.2  # seconds between two looks
PORTS = 3  # free ports that are tried; another program may take one before the server does
LINES, ERRORS, WIDTH = 10, 5, 300  # of the log in an error; WIDTH: characters of a line
SEARCHED = 500  # last lines of the log in which errors are looked for
ERROR = re.compile(r"\b\w*(error|exception)\b[:,] \S", re.IGNORECASE)
PREFIX = re.compile(r"^\(\w+ pid=\d+\) (\w+ [\d-]+ [\d:]+ \[\S+\] )?")  # of vLLM's lines
# variables of torchrun's world and of the trainer's Python are not the server's
LEFT_OUT = re.compile(r"(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_\w+")
LEFT_OUT_TOO = ("TORCHELASTIC_", "PYTHON")
PORT_TAKEN = r"(?i)address already in use"
# a sign in the log -> what to do
FIXES = {
    r"No module named '?vllm": "serve.python: the interpreter of an environment with vLLM"
    " (docs/rollout.md shows how to make one)",
    PORT_TAKEN: "another serve.port, or 0 for a free one",
    r"out of memory|OutOfMemory|MemoryError|memory utili[sz]ation|No available memory"
    r"|cache is needed": "a smaller serve.gpu_memory where the memory is shared with training, a"
    " larger one where the server has too little, or serve.devices for GPUs of its own",
    r"unrecogni[sz]ed arguments|expected one argument|invalid choice": "correct serve.args; the"
    " project was tested with vLLM 0.32",
}


@dataclass
class ServerProcess:
    """The server of `serve` for the model in `model` (config.json and tokenizer; its weights are
    pushed), with its output in the file `log`. It ends with this process, however that ends.

    `dtype`: vLLM's name, as float32. `max_length`: tokens of prompt and response together.
    """

    serve: Serve
    model: Path
    log: Path
    dtype: str
    max_length: int
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _log_start: int = field(default=0, init=False)  # bytes of earlier servers

    def start(self) -> str:
        """Start the server, which must not run, and return its URL once it is ready. Raises
        UserError with the log's last lines."""
        for left in reversed(range(PORTS)):
            port = self.serve.port or free_port()
            if not is_free(port):
                fix = "another port, or 0 for a free one"
                what = f"port {port} is taken by another program"
                raise UserError(what, where=f"{WHERE}.port", fix=fix)
            self._spawn(self.command(port))
            if self._wait(url := f"http://127.0.0.1:{port}"):
                return url
            if self.serve.port or not left or not re.search(PORT_TAKEN, self.last_lines()):
                raise self.failure("vLLM's server ended while it started")
        raise AssertionError("the loop above returns or raises")

    def alive(self) -> bool:
        """Check whether the process runs; it may hang."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and all its processes, and return when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(2 * watchdog.PATIENCE + 5)
        finally:
            process.kill()
            process.wait()

    def last_lines(self, count: int = LINES) -> str:
        """Return the last lines that this start of the server has written."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            text = file.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-count:])

    def failure(self, what: str) -> UserError:
        """Return the error of a server that is given up: the errors in its log, which stand above
        long tracebacks, the log's last lines, and what to do where the reason is a known one."""
        text = self.last_lines(SEARCHED)
        errors = [PREFIX.sub("", line).strip() for line in text.splitlines() if ERROR.search(line)]
        # not the whole text: warnings name what did not happen
        telling = "\n".join([*errors, self.last_lines()])
        found = [fix for sign, fix in FIXES.items() if re.search(sign, telling)]
        parts = [what]
        for title, lines in (
            ("errors in its log", [*dict.fromkeys(errors)][-ERRORS:]),
            ("last lines of its log", self.last_lines().splitlines()),
        ):
            shown = "\n".join(line[:WIDTH] for line in lines)
            parts.append(f"{title}:\n{indent(shown or '(none)', '    ')}")
        fix = found[0] if found else "read the log"
        return UserError("\n  ".join(parts), where=str(self.log), fix=fix)

    def command(self, port: int) -> list[str]:
        """Return the words that start the server. Raises UserError where its program is absent."""
        if self.serve.command:
            places = {"{model}": self.model, "{port}": port, "{plugin}": PLUGIN}
            words = []
            for word in self.serve.command:
                for name, value in places.items():
                    word = word.replace(name, str(value))
                words.append(word)
        else:
            words = [_python(self.serve), *self._arguments(port), *self.serve.args]
        if shutil.which(words[0]) is None:
            key = "command" if self.serve.command else "python"
            fix = "a program that can be run, by its whole path"
            raise UserError(f"no program {words[0]!r}", where=f"{WHERE}.{key}", fix=fix)
        return words

    def _arguments(self, port: int) -> list[str]:
        return [
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model), "--served-model-name", MODEL_NAME),
            *("--load-format", "dummy"),  # its weights are pushed
            # a request holds all its settings; none is taken from generation_config.json
            *("--generation-config", "vllm"),
            *("--host", "127.0.0.1", "--port", str(port), SCALE_OUT),
            *("--dtype", self.dtype, "--max-model-len", str(self.max_length)),
            *("--tensor-parallel-size", str(self.serve.tensor_parallel)),
            *("--gpu-memory-utilization", str(self.serve.gpu_memory)),
            *("--logprobs-mode", LOGPROBS),
            *("--worker-extension-cls", "gipo_vllm_worker.Extension"),
            *("--weight-transfer-config", '{"backend": "gipo"}'),  # of the plugin
            "--disable-uvicorn-access-log",
        ]

    def _spawn(self, command: list[str]) -> None:
        with user_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", watchdog.__file__, *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(self.serve.devices),
                    # Ctrl-C of the terminal reaches this process only, which then stops the server
                    start_new_session=True,
                )

    def _wait(self, url: str) -> bool:
        """Return whether the server is ready; False where it ended. Raises UserError where it is
        neither within start_timeout."""
        until = time.monotonic() + self.serve.start_timeout
        client = Client(url, self.serve.start_timeout)
        try:
            while time.monotonic() < until:
                if not self.alive():
                    self.stop()
                    return False
                if client.healthy():
                    return True
                time.sleep(TICK)
        except BaseException:  # Ctrl-C
            self.stop()
            raise
        self.stop()
        limit = f"{WHERE}.start_timeout, {self.serve.start_timeout:g} s"
        raise self.failure(f"vLLM's server was not ready within {limit}")


def environment(devices: str) -> dict[str, str]:
    """Return the variables of the server: this process's without those of torchrun and of its
    Python, the plugin's folder alone to import from, and the GPUs `devices`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not LEFT_OUT.fullmatch(name) and not name.startswith(LEFT_OUT_TOO)
    }
    own = {
        "PYTHONPATH": str(PLUGIN),
        "PYTHONUNBUFFERED": "1",  # the log is whole when the server dies
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that update weights
    }
    return kept | own | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})


def is_free(port: int) -> bool:
    """Check whether a server can listen on a port of this machine."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _python(serve: Serve) -> str:
    """Return the interpreter with vLLM: `serve.python` or $VLLM_PYTHON."""
    found = serve.python or os.environ.get("VLLM_PYTHON", "")
    if not found:
        raise UserError(
            "no Python with vLLM is given",
            where=f"{WHERE}.python",
            fix="export VLLM_PYTHON=…/bin/python of an environment with vLLM (docs/rollout.md shows"
            " how to make one), or algorithm.rollout.url of a server that runs",
        )
    return found
