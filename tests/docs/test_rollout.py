"""docs/rollout.md has the options and keys that the code has."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from gipo_megatron.serving import process
from gipo_megatron.serving.transfer import TRANSFERS
from gipo_megatron.specs import Serve

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "rollout.md").read_text(encoding="utf-8")


def test_the_command_of_a_server_is_that_of_a_run() -> None:
    """The same options, and of those that no user chooses the same values."""
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "api_server" in b]
    shown = shlex.split(block.replace("\\\n", " "))
    server = process.ServerProcess(Serve(python="/bin/sh"), Path("m"), Path("l"), "bfloat16", 2048)
    started = server.command(8000)
    assert {w for w in shown if w.startswith("--")} == (
        {w for w in started if w.startswith("--")} - {"--disable-uvicorn-access-log"}
    )
    fixed = ("--load-format", "--generation-config", "--logprobs-mode", "--worker-extension-cls")
    for option in (*fixed, "--weight-transfer-config", "--served-model-name", "--dtype"):
        assert shown[shown.index(option) + 1] == started[started.index(option) + 1], option
    assert "VLLM_SERVER_DEV_MODE=1" in shown
    folder = process.PLUGIN.relative_to(ROOT)
    assert (
        f"PYTHONPATH=$PWD/{folder}" in shown and (process.PLUGIN / "gipo_vllm_worker.py").is_file()
    )


def test_the_tables_name_every_key_and_transfer() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert {f.name for f in dataclasses.fields(Serve)} | {*TRANSFERS} <= {*rows}
    defaults = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \|", TEXT, re.MULTILINE))
    for f in dataclasses.fields(Serve):
        value = getattr(Serve(), f.name)
        assert defaults[f.name] == (
            f'"{value}"'
            if isinstance(value, str)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        ), f.name
