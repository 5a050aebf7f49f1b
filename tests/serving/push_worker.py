"""A trainer of several ranks that pushes the weights of a folder to a server.

push_worker.py URL FOLDER TRANSFER TENSOR PIPELINE VERSION OUT.json      {name: sha256 of its bytes}
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gipo_megatron.megatron.hf import export_weights, load_hf
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.serving.client import Client
from gipo_megatron.serving.transfer import TRANSFERS
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.weights.hf_config import architecture_from_hf


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def main(
    url: str, folder: str, transfer: str, tensor: str, pipeline: str, version: str, out: str
) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.create(Parallel(tensor=int(tensor), pipeline=int(pipeline)), seed=0)
    architecture = architecture_from_hf(folder)
    chunks = build_chunks(architecture, mesh, Precision("fp32"), seed=0)
    load_hf(folder, chunks, mesh, architecture)
    sums: dict[str, str] = {}

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, value in export_weights(chunks, mesh, architecture):
            sums[name] = digest(value)
            yield name, value

    if mesh.is_main:
        sender = TRANSFERS[transfer](checksums=True)
        sender.push(Client(url, timeout=120), weights(), version)
        Path(out).write_text(json.dumps(sums))
    else:
        for _ in weights():
            pass
    mesh.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
