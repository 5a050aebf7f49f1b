"""Checkpoint -> Hugging Face folder: python tools/megatron_to_hf.py checkpoint=DIR out=DIR
[role=critic] [verify=false]

One process, no GPU, whatever layout the checkpoint was trained in. The policy unless a role is
named; reward models and critics become AutoModelForSequenceClassification with one label. Writes
safetensors, config, generation config, tokenizer and a model card. Verified by default: names,
shapes, dtypes, bytes, every tensor, and the outputs against transformers in fp32 (4 bytes a
parameter of memory); verify=false leaves out the outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gipo_megatron.conversion.command import arguments, run


def main(argv: list[str]) -> None:
    words = arguments(argv, required=("checkpoint", "out"), optional={"role": "", "verify": "true"})
    from gipo_megatron.conversion.convert import to_hf
    from gipo_megatron.megatron.mesh import Mesh
    from gipo_megatron.specs import Parallel
    from gipo_megatron.telemetry.console import Display

    mesh, progress = Mesh.create(Parallel()), Display()
    try:
        verify = words["verify"] == "true"
        to_hf(
            Path(words["checkpoint"]),
            Path(words["out"]),
            mesh,
            role=words["role"],
            verify=verify,
            progress=progress,
        )
    finally:
        mesh.close()
    progress.line(f"wrote {words['out']}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, sys.argv[1:]))
