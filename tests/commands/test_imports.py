"""What a command imports: recipes are read without torch, and a run imports a package when it needs
it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gipo_megatron.weights.hf_files import SINGLE
from tests.runs import chain

ROOT = Path(__file__).resolve().parents[2]
# The packages that the recipe commands may import, each of them in less than a tenth of a second.
PACKAGES = {
    *("gipo_megatron", "yaml", "_yaml"),
    *("omegaconf", "antlr4"),
    *("jinja2", "markupsafe"),
    *("safetensors", "numpy"),  # of weights on this machine
}
COMMANDS = [
    ["list"],
    ["show", "tiny/gipo"],
    ["check", "tiny/sft", "tiny/gipo", "hh_gipo", "hh_rm", "hh_evaluate"],
    ["diff", "hh_ppo_kl", "hh_gipo"],
]
START = """
import json, sys
before = {*sys.modules}
from gipo_megatron import cli
from gipo_megatron.weights.hf_files import open_weights
codes = [cli.main(["recipe", *words]) for words in json.loads(sys.argv[1])]
shapes = open_weights(sys.argv[2]).shapes  # as `check` of a recipe that loads a folder
made = {name for name, module in sys.modules.items() if getattr(module, "__spec__", None)}
new = {name.partition(".")[0] for name in made - before}  # without the parts that Cython shares
print(json.dumps([codes, shapes, sorted(new - sys.stdlib_module_names)]))
"""


def test_recipe_commands_import_these_packages_only(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / SINGLE)
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(COMMANDS), str(tmp_path)],
        capture_output=True,
        text=True,
        env=chain.environment(),
        cwd=ROOT,
        check=True,
        timeout=200,
    )
    codes, shapes, packages = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 0, 0] and shapes == {"a": [2, 3]}
    assert "gipo_megatron" in packages
    assert {*packages} <= PACKAGES
