"""Convert checkpoints and Hugging Face folders, in one process, without a GPU.

gipo convert to-hf checkpoint=DIR out=DIR [role=critic] [merge=true] [verify=false]
gipo convert from-hf hf=DIR_OR_HUB_NAME out=DIR [verify=false]

to-hf: for a checkpoint of any layout. Converts the policy unless a role is named;
reward models and critics become AutoModelForSequenceClassification with one label. Writes
safetensors, config, generation config, tokenizer and a model card. Of a model with adapters (LoRA)
these alone are written, in PEFT's format; merge=true adds them to the weights: a whole model.

from-hf: Llama 2/3, Mistral, Qwen2, Qwen2.5, Qwen3, and their sequence classifiers with one label;
PEFT's plain LoRA adapters on them, which stay adapters.
The checkpoint loads at any tensor x pipeline x data layout. Recipes also read Hugging Face folders
directly (models.<role>.load).

Both verify the result: names, shapes, dtypes, every tensor bit for bit, and the outputs against
transformers (or PEFT) in fp32 (4 bytes of memory a parameter). verify=false leaves out the outputs.
Exit code 0: done; 2: a mistake, or a mismatch; 130: stopped by Ctrl-C. OUT is complete or absent.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gipo_megatron.commands.words import arguments
from gipo_megatron.errors import UserError

STOPPED = "stopped; nothing was left under the final name"


def main(argv: Sequence[str]) -> int:
    direction, *words = argv
    if direction not in DIRECTIONS:
        raise UserError(
            f"unknown direction {direction!r}",
            where="command line",
            fix="gipo convert to-hf …, or gipo convert from-hf …",
        )
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    DIRECTIONS[direction](words)
    return 0


@contextmanager
def single_process(out: str) -> Iterator[dict[str, Any]]:
    """Yield the mesh of one process and a progress line, as keyword arguments. Raises UserError
    where another process writes `out`."""
    from gipo_megatron.megatron.mesh import Mesh
    from gipo_megatron.specs import Parallel
    from gipo_megatron.telemetry.console import Display
    from gipo_megatron.training.run_lock import RunLock

    with RunLock(Path(out), Path(f"{out}.lock"), "out") as lock:
        lock.take()
        mesh = Mesh.create(Parallel())
        try:
            yield {"mesh": mesh, "progress": Display()}
        finally:
            mesh.close()


def to_hf(argv: list[str]) -> None:
    optional = {"role": "", "merge": "false", "verify": "true"}
    words = arguments(argv, required=("checkpoint", "out"), optional=optional)
    with single_process(words["out"]) as process:
        from gipo_megatron.conversion import convert

        checkpoint, out, verify = words["checkpoint"], words["out"], words["verify"] == "true"
        role, merge = words["role"], words["merge"] == "true"
        folders = Path(checkpoint), Path(out)
        convert.to_hf(*folders, role=role, merge=merge, verify=verify, **process)
        process["progress"].line(f"wrote {out}")


def from_hf(argv: list[str]) -> None:
    words = arguments(argv, required=("hf", "out"), optional={"verify": "true"})
    with single_process(words["out"]) as process:
        from gipo_megatron.conversion import convert

        out, verify = words["out"], words["verify"] == "true"
        convert.to_megatron(words["hf"], Path(out), verify=verify, **process)
        process["progress"].line(f"wrote {out}")


DIRECTIONS = {"to-hf": to_hf, "from-hf": from_hf}
