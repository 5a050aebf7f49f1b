"""Hugging Face folder -> checkpoint: python tools/hf_to_megatron.py hf=DIR_OR_HUB_NAME out=DIR
[verify=false]

One process, no GPU. The checkpoint loads at any tensor x pipeline x data layout. Language models
(Llama 2/3, Mistral, Qwen2, Qwen2.5, Qwen3) and their sequence classifiers with one label. Verified
by default: every tensor bit for bit, and the outputs against transformers in fp32 (4 bytes a
parameter of memory); verify=false leaves out the outputs. `models.<role>.load` of a recipe takes
Hugging Face folders as they are, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gipo_megatron.conversion.command import arguments, run


def main(argv: list[str]) -> None:
    words = arguments(argv, required=("hf", "out"), optional={"verify": "true"})
    from gipo_megatron.conversion.convert import to_megatron
    from gipo_megatron.megatron.mesh import Mesh
    from gipo_megatron.specs import Parallel
    from gipo_megatron.telemetry.console import Display

    mesh, progress = Mesh.create(Parallel()), Display()
    try:
        to_megatron(
            words["hf"],
            Path(words["out"]),
            mesh,
            verify=words["verify"] == "true",
            progress=progress,
        )
    finally:
        mesh.close()
    progress.line(f"wrote {words['out']}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, sys.argv[1:]))
