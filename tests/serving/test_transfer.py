"""Pushes of weights to a server of a few lines: order of requests, bytes, memory, failures."""

from __future__ import annotations

import datetime
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.hf import export_weights
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.serving import transfer
from gipo_megatron.serving.client import ServerLost
from gipo_megatron.serving.transfer import TRANSFERS, Transfer, folder_with_room, group
from gipo_megatron.specs import Architecture, Precision
from tests.watch import LiveBytes

MIB = 1 << 20
Weights = Iterator[tuple[str, Tensor]]


class Server:
    """The server's end: what it was sent. `fail`: the route that raises, as a lost server does."""

    url, timeout = "http://127.0.0.1:1", 20.0

    def __init__(self, fail: str = "", after: int = 0) -> None:
        self.fail, self.after = fail, after  # `after` calls of the route are answered
        self.routes: list[str] = []
        self.buckets: list[dict[str, Any]] = []
        self.weights: dict[str, Tensor] = {}
        self.group: Any = None
        self.keep = True

    def get(self, route: str, **query: Any) -> Any:
        assert route == "/get_world_size"
        return {"world_size": 1}

    def post(self, route: str, body: Any = None, **query: Any) -> Any:
        if route == self.fail and self.routes.count(route) >= self.after:
            self.group = None
            raise OSError("lost")
        self.routes.append(route)
        if route == "/init_weight_transfer_engine" and body["init_info"]:
            self.join(**body["init_info"])
        if route == "/update_weights":
            self.receive(**body["update_info"])
        return None

    def join(self, host: str, port: int, world_size: int, backend: str, timeout: float) -> None:
        limit = datetime.timedelta(seconds=timeout)
        store = dist.TCPStore(host, port, world_size, False, timeout=limit, wait_for_workers=False)
        store.set("here/1", "")
        self.group = group(store, 1, world_size, backend, limit)

    def receive(
        self, names: list[str], shapes: list[list[int]], dtype: str, checksums: bool, path: str = ""
    ) -> None:
        kind = getattr(torch, dtype)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if path:
            flat = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=kind)
            assert flat.numel() == sum(sizes)
        else:
            flat = torch.empty(sum(sizes), dtype=kind)
        for name, shape, part in zip(names, shapes, flat.split(sizes), strict=True):
            if not path:
                self.group.broadcast([part], dist.BroadcastOptions()).wait()
            if self.keep:
                self.weights[name] = part.view(shape)
        self.buckets.append({"names": names, "bytes": flat.nbytes, "path": path})


def model(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    """Matrices of `sizes` bytes with different values, and a vector."""
    width = 64
    out = []
    for i, size in enumerate(sizes):
        rows = size // width // dtype.itemsize
        out.append((f"layers.{i}.weight", torch.full((rows, width), i + 0.5, dtype=dtype)))
    return [*out, ("norm.weight", torch.arange(7).to(dtype))]


def watched(weights: list[tuple[str, Tensor]], end: list[str]) -> Weights:
    yield from weights
    end.append("end")


@pytest.fixture(params=sorted(TRANSFERS))
def sender(request: pytest.FixtureRequest) -> Transfer:
    return TRANSFERS[request.param]()


def test_a_push_pauses_sends_every_bit_in_order_and_resumes(sender: Transfer) -> None:
    server, weights = Server(), model(20 * MIB, 20 * MIB, 8 * MIB, 40 * MIB, dtype=torch.bfloat16)
    sender.push(server, iter(weights), "a-1")
    assert list(server.weights) == [name for name, _ in weights]
    for name, tensor in weights:
        assert server.weights[name].dtype == tensor.dtype
        assert torch.equal(server.weights[name], tensor)
    # at most 32 MiB, or one tensor
    names = [bucket["names"] for bucket in server.buckets]
    assert [[name.split(".")[-2] for name in each] for each in names] == [
        ["0"], ["1", "2"], ["3"], ["norm"]
    ]  # fmt: skip
    assert server.routes == [
        "/pause",
        "/collective_rpc",
        "/start_weight_update",
        "/init_weight_transfer_engine",
        *["/update_weights"] * 4,
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ]
    assert not any(Path(bucket["path"]).is_file() for bucket in server.buckets)


def test_views_that_are_not_contiguous_and_two_dtypes_arrive_whole(sender: Transfer) -> None:
    whole = torch.arange(24.0).view(4, 6)
    weights = [("a", whole.T), ("b", whole[:, 2:4]), ("c", whole[0].to(torch.float16))]
    server = Server()
    sender.push(server, iter(weights), "v")
    assert [bucket["names"] for bucket in server.buckets] == [["a", "b"], ["c"]]
    assert all(torch.equal(server.weights[name], tensor) for name, tensor in weights)


def test_a_server_is_joined_once_and_its_successor_again(sender: Transfer) -> None:
    first, second = Server(), Server()
    for server in (first, first, second):
        sender.push(server, iter(model(MIB)), "v")
    assert first.routes.count("/init_weight_transfer_engine") == 1
    assert second.routes.count("/init_weight_transfer_engine") == 1
    assert second.weights.keys() == first.weights.keys()


@pytest.mark.parametrize(
    ("route", "after"),
    [("/pause", 0), ("/init_weight_transfer_engine", 0), ("/update_weights", 0),
     ("/update_weights", 1), ("/finish_weight_update", 0)],
)  # fmt: skip
def test_a_lost_server_raises_after_the_last_tensor(
    sender: Transfer, route: str, after: int
) -> None:
    """Other ranks are inside the iterator's collectives; and the next push joins again."""
    end: list[str] = []
    server, weights = Server(route, after), model(20 * MIB, 20 * MIB, 20 * MIB)
    with pytest.raises(OSError, match="lost"):
        sender.push(server, watched(weights, end), "v")
    assert end == ["end"] and "/resume" not in server.routes
    assert not list(Path("/dev/shm").glob(f"{transfer.PREFIX}*"))
    server.fail = ""
    sender.push(server, iter(weights), "w")
    assert all(torch.equal(server.weights[name], tensor) for name, tensor in weights)


def test_an_error_of_the_export_leaves_no_file_and_no_open_server(sender: Transfer) -> None:
    def broken() -> Weights:
        yield from model(20 * MIB, 20 * MIB)
        raise RuntimeError("a rank is gone")

    server = Server()
    with pytest.raises(RuntimeError, match="a rank is gone"):
        sender.push(server, broken(), "v")
    assert "/finish_weight_update" not in server.routes and "/resume" not in server.routes
    assert not list(Path("/dev/shm").glob(f"{transfer.PREFIX}*"))


def made() -> Weights:
    """40 tensors of 1/4 MiB, then two of 3 MiB, then a small one."""
    for i, size in enumerate([*[MIB // 16] * 40, *[3 * MIB // 4] * 2, 16]):
        yield str(i), torch.zeros(size)


def exported(mesh: Mesh) -> Weights:
    """A model whose largest tensor is an embedding of 3 MiB."""
    architecture = Architecture(2, 64, 128, 4, 2, 16, 12288, 64, tied_embeddings=True)
    chunks = build_chunks(architecture, mesh, Precision("fp32"), seed=0)
    return export_weights(chunks, mesh, architecture)


@pytest.mark.parametrize("source", ["made", "exported"])
def test_memory_grows_by_two_tensors_at_most(
    sender: Transfer, source: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bucket of 1 MiB here. The server's own copies are no tensors of this thread."""
    monkeypatch.setattr(transfer, "BUCKET", MIB)
    large, files = 3 * MIB, [0]
    server = Server()
    server.keep = False
    receive = server.receive

    def measured(**bucket: Any) -> None:
        if bucket.get("path"):
            files.append(Path(bucket["path"]).stat().st_size)
        receive(**bucket)

    monkeypatch.setattr(server, "receive", measured)
    weights = made() if source == "made" else exported(mesh)
    gc.collect()
    with LiveBytes() as live:
        sender.push(server, weights, "v")
    assert max(files) in (0, large) and live.largest == large
    assert live.peak + max(files) <= 2 * large + MIB // 8


def test_a_server_whose_workers_do_not_join_is_lost() -> None:
    server = Server()
    server.join = lambda **info: None  # type: ignore[method-assign]
    with pytest.raises(ServerLost, match="did not join"):
        TRANSFERS["broadcast"]().push(server, iter(model(MIB)), "v")


def test_files_are_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = {"/dev/shm": 10 * MIB, str(tmp_path): 100 * MIB}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda folder, mode: folder in free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    assert folder_with_room(MIB) == "/dev/shm"
    assert folder_with_room(50 * MIB) == str(tmp_path)
    with pytest.raises(UserError, match="has 200 MiB free") as error:
        folder_with_room(200 * MIB)
    assert "transfer=broadcast" in error.value.fix
    del free["/dev/shm"]
    assert folder_with_room(MIB) == str(tmp_path)


def test_a_full_disk_is_the_users_error_after_the_last_tensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(prefix: str, dir: str) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / prefix)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    end: list[str] = []
    with pytest.raises(UserError, match="cannot write: No space left"):
        TRANSFERS["file"]().push(Server(), watched(model(MIB), end), "v")
    assert end == ["end"]


def test_a_killed_trainers_bucket_is_removed_and_a_living_ones_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfer, "folders", lambda: (str(tmp_path), str(tmp_path / "none")))
    names = {name: f"{transfer.PREFIX}{name}" for name in ("abandoned", "locked", "new")}
    for name in (*names.values(), "other"):
        (tmp_path / name).write_bytes(b"1")
        if name != names["new"]:
            os.utime(tmp_path / name, (0, 0))
    with (tmp_path / names["locked"]).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        TRANSFERS["file"]().push(Server(), iter(model(MIB)), "v")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names["locked"], names["new"], "other"}
