"""The way of weights from the trainer to vLLM's server: pause, buckets of tensors, resume.

A bucket holds tensors of one dtype, at most 32 MiB of them or one tensor. Its names and shapes
are sent by HTTP (`/update_weights`), its bytes by file or by broadcast. The receiving end is
serving/plugin/gipo_vllm_worker.py.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.files import user_errors
from gipo_megatron.serving.client import Client, ServerLost

BUCKET = 32 << 20  # bytes
PREFIX = "gipo_weights_"  # of the names of files


@dataclass
class Transfer:
    """Push of weights to a server. Rank 0 of the trainer has one object for a whole run.

    checksums: let the server compute sha256 of every received tensor (`gipo_checksums`).
    """

    checksums: bool = False
    _joined: Client | None = field(init=False, default=None)
    _names: list[str] = field(init=False, default_factory=list)
    _shapes: list[list[int]] = field(init=False, default_factory=list)
    _bytes: int = field(init=False, default=0)

    def push(self, client: Client, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Load all weights into the server, which then has this weight version.

        weights: (Hugging Face name, whole tensor) in the model's order; always iterated to its
        end, also after an error, since other ranks take part in it. After an error the server
        stays paused, and the next push joins again; so does one with another client, which is
        another server. Raises ServerLost and UserError.
        """
        try:
            client.post("/pause", mode="abort")
            client.post("/collective_rpc", {"method": "gipo_reset"})
            client.post("/start_weight_update")
            self._send_all(client, weights)
            client.post("/finish_weight_update", {"weight_version": version})
            client.post("/reset_prefix_cache")
            client.post("/resume")
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):  # not at Ctrl-C: the other ranks end as well
                for _ in weights:
                    pass
            raise

    def _send_all(self, client: Client, weights: Iterator[tuple[str, Tensor]]) -> None:
        dtype = None
        for name, tensor in weights:
            if client is not self._joined:
                self._join(client, tensor.device)
                self._joined = client
            if self._names and (dtype != tensor.dtype or self._bytes + tensor.nbytes > BUCKET):
                self._flush(client, dtype)
            dtype = tensor.dtype
            self._names.append(name)
            self._shapes.append(list(tensor.shape))
            self._bytes += tensor.nbytes
            self._add(tensor.detach().contiguous())
            if self._bytes >= BUCKET:
                self._flush(client, dtype)
            del tensor  # before the next one is made
        if self._names:
            self._flush(client, dtype)

    def _flush(self, client: Client, dtype: torch.dtype | None) -> None:
        bucket = {
            "names": self._names,
            "shapes": self._shapes,
            "dtype": str(dtype).removeprefix("torch."),
            "checksums": self.checksums,
        }
        self._send(client, bucket)
        self._clear()

    def close(self) -> None:
        """Leave the server; a later push joins again."""
        self._joined = None
        self._clear()

    def _clear(self) -> None:
        """Remove the bucket."""
        self._names, self._shapes, self._bytes = [], [], 0

    def _join(self, client: Client, device: torch.device) -> None:
        raise NotImplementedError

    def _add(self, tensor: Tensor) -> None:
        raise NotImplementedError

    def _send(self, client: Client, bucket: dict[str, Any]) -> None:
        raise NotImplementedError


@dataclass
class FileTransfer(Transfer):
    """A bucket is a file that the server maps: both are on one host.

    The file is in shared memory where that has room, else in the folder for temporary files.
    """

    _path: Path | None = field(init=False, default=None)
    _file: Any = field(init=False, default=None)

    def _join(self, client: Client, device: torch.device) -> None:
        remove_abandoned()
        client.post("/init_weight_transfer_engine", {"init_info": {}})

    def _add(self, tensor: Tensor) -> None:
        if self._path is None:
            folder = folder_with_room(max(BUCKET, tensor.nbytes))
            handle, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
            self._path, self._file = Path(path), os.fdopen(handle, "wb", buffering=0)
            fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed, by a kill too
        data: Any = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
        left = memoryview(data)
        with user_errors(self._path):
            while left:
                left = left[self._file.write(left) :]

    def _send(self, client: Client, bucket: dict[str, Any]) -> None:
        client.post("/update_weights", {"update_info": {**bucket, "path": str(self._path)}})

    def _clear(self) -> None:
        super()._clear()
        if self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._path = self._file = None


def remove_abandoned() -> None:
    """Remove the buckets of trainers that were killed during a push: no process has their lock.
    A file of the last minute stays: its trainer may be about to lock it."""
    for folder in folders():
        for path in Path(folder).glob(f"{PREFIX}*"):
            with suppress(OSError), path.open("rb") as file:  # locked, gone, or another user's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(file.fileno()).st_mtime > 60:
                    path.unlink()


def folders() -> tuple[str, str]:
    return "/dev/shm", tempfile.gettempdir()


def folder_with_room(size: int) -> str:
    """Return /dev/shm where it has `size` bytes free, else the folder for temporary files."""
    for folder in folders():
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > size:
            return folder
    raise UserError(
        f"neither /dev/shm nor {tempfile.gettempdir()} has {size / 2**20:.0f} MiB free for the"
        " weights on their way to the server",
        where="algorithm.rollout.transfer",
        fix="make room, set TMPDIR to a folder with room, or transfer=broadcast",
    )


@dataclass
class BroadcastTransfer(Transfer):
    """A bucket comes by broadcasts in a process group of rank 0 and the server's workers.

    NCCL where the weights are on a GPU, which no worker may share; gloo elsewhere.
    """

    _group: Any = field(init=False, default=None)
    _tensors: list[Tensor] = field(init=False, default_factory=list)
    _pool: ThreadPoolExecutor = field(
        init=False, default_factory=lambda: ThreadPoolExecutor(1), repr=False
    )

    def _join(self, client: Client, device: torch.device) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        size = 1 + client.get("/get_world_size")["world_size"]
        host, limit = own_address(client.url), datetime.timedelta(seconds=client.timeout)
        store = dist.TCPStore(host, 0, size, True, timeout=limit, wait_for_workers=False)
        info = {
            "host": host,
            "port": store.port,
            "world_size": size,
            "backend": backend,
            "timeout": client.timeout,
        }
        answer = self._pool.submit(client.post, "/init_weight_transfer_engine", {"init_info": info})
        there = [f"here/{rank}" for rank in range(1, size)]
        while not store.check(there):
            if answer.done():
                answer.result()  # raises what the server answered
                raise ServerLost(f"{client.url}: its workers did not join the trainer's group")
            time.sleep(0.01)
        with group_errors(answer):
            self._group = group(store, 0, size, backend, limit)
        answer.result()

    def _add(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)

    def _send(self, client: Client, bucket: dict[str, Any]) -> None:
        answer = self._pool.submit(client.post, "/update_weights", {"update_info": bucket})
        with group_errors(answer):
            works = [self._group.broadcast([t], dist.BroadcastOptions()) for t in self._tensors]
            answer.result()
            for work in works:
                work.wait()

    def close(self) -> None:
        super().close()
        self._group = None

    def _clear(self) -> None:
        super()._clear()
        self._tensors = []


@contextmanager
def group_errors(answer: Future[Any]) -> Iterator[None]:
    """Raise the server's own error in place of the group's, where it has one."""
    try:
        yield
    except RuntimeError as error:
        answer.result()
        raise UserError(
            f"the trainer and the server cannot form a group: {str(error).splitlines()[0]}",
            where="algorithm.rollout.transfer",
            fix="transfer=file on one host; NCCL needs other GPUs for the server (serve.devices)",
        ) from error


def group(store: Any, rank: int, size: int, backend: str, limit: datetime.timedelta) -> Any:
    """Return a process group beside the trainer's own."""
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def own_address(url: str) -> str:
    """Return this machine's address on its way to a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        address: str = probe.getsockname()[0]
    return address


TRANSFERS = {"file": FileTransfer, "broadcast": BroadcastTransfer}
