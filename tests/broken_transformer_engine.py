"""A package called transformer_engine whose import fails, as a half-installed one's does."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What Transformer Engine raises without its metapackage, without a library, and without a package
# that it needs.
ASSERTION = 'raise AssertionError("Could not find `transformer-engine` PyPI package.")'
IMPORT = 'raise ImportError("libcudnn.so.9: cannot open\\nshared object file")'
MODULE = """
import os
framework = os.environ.get("NVTE_FRAMEWORK", "any")
raise ModuleNotFoundError("No module named 'pydantic', framework " + framework)
"""


def install(folder: Path, code: str) -> dict[str, str]:
    """Writes it to `folder`. Returns the environment of a process that finds it there, without
    variables that this process set."""
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(code + "\n")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "NVTE_FRAMEWORK")
    }
    return environment | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
