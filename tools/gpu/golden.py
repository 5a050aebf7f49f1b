"""golden.json: python -m tools.gpu.golden FILE, on the CPU, in a process of its own.

chain    runs: what was run; metrics: what each logged
plans    the planner's peak of each phase that a part measures, in GiB, at full and at tiny size
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is made without GPUs

from gipo_megatron.files import write_json
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from tools.gpu import chain, plans


def main(file: Path) -> None:
    # before there is a process group
    planned = {size: plans.predict(tiny=size == "tiny") for size in ("full", "tiny")}
    made: dict[str, Any] = {"plans": {"cases": plans.fingerprint(), **planned}}
    mesh = Mesh.create(Parallel(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        metrics = {name: chain.train(mesh, Path(folder), name) for name in chain.RUNS}
    mesh.close()
    made["chain"] = {"runs": chain.ARGUMENTS, "metrics": metrics}
    write_json(file, made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
