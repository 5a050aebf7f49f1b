from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gipo_megatron.megatron  # noqa: F401  # sets the defaults
from gipo_megatron import environment
from gipo_megatron.training import run_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty os.environ for environment.py; changes are forgotten."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(environment, "os", SimpleNamespace(environ=variables))
    monkeypatch.setattr(environment, "_chosen", {})
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.11.0+cu130")
    return variables


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.6.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.11.0+cu130", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
        ("3.0.0a0+git1234", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocators_variable(version: str, name: str) -> None:
    assert environment.allocator_variable(version) == name


def test_what_is_not_set_gets_its_default(bare: dict[str, str]) -> None:
    expected = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NVTE_FRAMEWORK": "pytorch",
    }
    assert environment.set_defaults() == expected and bare == expected
    # a second call finds them set, and still lists them as defaults
    assert environment.set_defaults() == expected
    assert (
        environment.line() == "environment: CUDA_DEVICE_MAX_CONNECTIONS=1 (default)"
        " PYTORCH_ALLOC_CONF=expandable_segments:True (default) NVTE_FRAMEWORK=pytorch (default)"
    )


def test_what_the_user_set_stays(bare: dict[str, str]) -> None:
    """Under either name of the allocator's variable: the newer one would win over the user's."""
    theirs = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
    }
    bare.update(theirs)
    assert environment.set_defaults() == {"NVTE_FRAMEWORK": "pytorch"}
    assert bare == theirs | {"NVTE_FRAMEWORK": "pytorch"}
    line = (
        "environment: CUDA_DEVICE_MAX_CONNECTIONS=8 PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512"
        " NVTE_FRAMEWORK=pytorch (default)"
    )
    assert environment.line() == line


def test_determinism_of_the_libraries(bare: dict[str, str]) -> None:
    """Values that torch (CUBLAS_WORKSPACE_CONFIG), Megatron-Core (NVTE_…) and Megatron-LM
    (NCCL_ALGO) accept in their own checks."""
    bare.update({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "NCCL_ALGO": "Ring"})
    environment.set_deterministic()
    assert bare == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }
    del bare["NCCL_ALGO"]
    environment.set_deterministic()
    assert bare["NCCL_ALGO"] == "^NVLS"


def test_importing_megatron_sets_them() -> None:
    """Tests and tools use no launcher; Megatron-Core would warn of CUDA_DEVICE_MAX_CONNECTIONS."""
    assert {"CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FRAMEWORK"} <= environment.variables().keys()
    assert environment.variables().keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


def test_a_run_keeps_them() -> None:
    assert (
        json.loads(json.dumps(run_folder.environment()))["variables"]
        == environment.variables()
        != {}
    )


WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            names = "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FRAMEWORK"
            print("torch", *map(os.environ.get, names), file=sys.stderr)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, "launch")
sys.argv = ["train.py", "recipe=tiny/sft", "dry_run=true"]
import runpy
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_a_launcher_sets_them_before_torch_is_imported() -> None:
    """launch/evaluate.py calls the same function; it needs weights before it imports torch."""
    variables = {
        key: value for key, value in os.environ.items() if key not in environment.variables()
    } | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=200, check=False
    )
    # a library may look for torch before another imports it: a line each time
    assert (done.returncode, {*done.stderr.splitlines()}) == (0, {"torch 1 pytorch"})
    assert "verdict" in done.stdout


@pytest.mark.parametrize(
    "code", ["import gipo_megatron.environment", "from gipo_megatron.cli import main; main(WORDS)"]
)
def test_the_package_and_the_list_of_recipes_import_no_torch(code: str) -> None:
    lines = ["import sys", "WORDS = ['recipe', 'list']", code, "print('torch' in sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
