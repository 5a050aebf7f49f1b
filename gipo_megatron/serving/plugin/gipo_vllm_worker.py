"""The receiving end of a push of weights (serving/transfer.py), inside vLLM's workers.

vLLM's server has its own environment, so this file imports nothing of the project. The server is
started with this file's folder alone on PYTHONPATH, and with

    VLLM_SERVER_DEV_MODE=1
    --enable-scale-out
    --worker-extension-cls gipo_vllm_worker.Extension
    --weight-transfer-config '{"backend": "gipo"}'

Weights come in buckets under Hugging Face names, in checkpoint format: vLLM fuses, shards and
repacks them itself (its layerwise reload). One backend takes both transports: the bytes of a
bucket are in a file, or they come by broadcast from the trainer.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

PLUGIN = 1  # version of what the trainer and this file exchange


@dataclass
class Join(WeightTransferInitInfo):
    """The trainer's group. Without a host there is none: buckets come as files."""

    host: str = ""
    port: int = 0
    world_size: int = 0
    backend: str = "gloo"
    timeout: float = 600.0


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Tensors of one dtype, one after the other, without gaps.

    path: the file that holds their bytes; empty: a broadcast for each tensor, from rank 0.
    """

    names: list[str]
    shapes: list[list[int]]
    dtype: str
    path: str = ""
    checksums: bool = False


class Weights(WeightTransferEngine[Join, Bucket]):
    """vLLM's weight-transfer engine of this project."""

    init_info_cls, update_info_cls = Join, Bucket
    supports_draft_weight_update = False
    group: Any = None

    def init_transfer_engine(self, init_info: Join) -> None:
        if init_info.host:
            self.shutdown()
            own = self.parallel_config
            rank = 1 + own.data_parallel_index * own.world_size + own.rank
            self.group = join(init_info, rank)

    def start_weight_update(self) -> None:
        self.received: set[str] = set()
        self.checksums: dict[str, str] = {}
        for layer in self.model.modules():  # a failed update leaves layers without weights
            info = get_layerwise_info(layer)
            if info.can_load() and info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()
        self.head, self.embedding = tied_layers(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class's call of this fails on a CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Bucket) -> None:
        try:
            tensors = dict(self._tensors(update_info))
        except BaseException:
            self.shutdown()  # the trainer's end of the broadcast ends as well
            raise
        if update_info.checksums:
            for name, tensor in tensors.items():
                data: Any = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
                self.checksums[name] = hashlib.sha256(data).hexdigest()
        self.model.load_weights(tensors.items())
        self.received |= tensors.keys()

    def _tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        dtype = getattr(torch, bucket.dtype)
        sizes = [torch.Size(shape).numel() for shape in bucket.shapes]
        if bucket.path:
            flat = torch.from_file(bucket.path, shared=False, size=sum(sizes), dtype=dtype)
        else:
            flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        for name, shape, part in zip(bucket.names, bucket.shapes, flat.split(sizes), strict=True):
            if not bucket.path:
                self.group.broadcast([part], dist.BroadcastOptions()).wait()
            yield name, part.view(shape)

    def finish_weight_update(self) -> None:
        unfed = [name for name, layer in missing(self.model) if layer is not self.head]
        if unfed:
            raise ValueError(
                f"the trainer sent {len(self.received)} tensors, which leaves layers of the"
                f" server's model without weights: {', '.join(unfed[:6])}"
            )
        if self.head is not None and "lm_head.weight" in self.received:
            raise ValueError("the trainer's model has an output weight; the server's ties its own")
        finalize_layerwise_reload(self.model, self.model_config)
        if hasattr(self.head, "cpu_linear"):
            # a packed copy of the embedding, which vLLM 0.32 leaves as it was: take the new one
            self.head.cpu_linear = self.embedding.cpu_linear

    def shutdown(self) -> None:
        self.group = None


def join(info: Join, rank: int) -> Any:
    """Return a process group beside vLLM's own: the trainer's rank 0, then every worker."""
    limit = datetime.timedelta(seconds=info.timeout)
    store = dist.TCPStore(
        info.host, info.port, info.world_size, False, timeout=limit, wait_for_workers=False
    )
    store.set(f"here/{rank}", "")
    if info.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, info.world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, info.world_size, options)


def tied_layers(model: nn.Module) -> tuple[Any, Any]:
    """Return the output layer and the embedding where they share their weight; else None, None."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    for layer in model.modules():
        if weight is not None and layer is not head and getattr(layer, "weight", None) is weight:
            return head, layer
    return None, None


def missing(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that lack some of their weights, during a layerwise reload."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        needed = sum(
            getattr(p, "weight_loader_numel", p.numel()) for p in layer.parameters(recurse=False)
        )
        if hasattr(layer, "num_embeddings_padded"):  # has rows that no checkpoint has
            needed = min(needed, 1)
        # a layer that had all its weights can load no more
        if info.can_load() and info.load_numel < needed:
            yield name, layer


class Extension:
    """Methods of a worker that /collective_rpc calls."""

    def gipo_describe(self) -> dict[str, Any]:
        model: Any = self.model_runner.model_config  # type: ignore[attr-defined]
        config = model.hf_text_config
        return {
            "plugin": PLUGIN,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": model.logprobs_mode,
        }

    def gipo_checksums(self) -> dict[str, str]:
        """{name: sha256 of its bytes} of the last update, where its buckets had `checksums`."""
        return self.weight_transfer_engine.checksums  # type: ignore[attr-defined]

    def gipo_reset(self) -> None:
        """End an update that its trainer left unfinished: vLLM refuses to start another."""
        self._weight_update_active = False


WeightTransferEngineFactory.register_engine("gipo", Weights)
