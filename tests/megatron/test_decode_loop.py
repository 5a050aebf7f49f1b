"""The decode loop as a GPU runs it: steps recorded once per shape and replayed at fixed addresses,
reads only between them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import decode_loop
from gipo_megatron.megatron.decode_loop import PACES, Graphs, Loop, Pace, _fewer
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Architecture, Parallel, Sampling
from tests.parity.generation_cases import (
    GREEDY,
    NEVER,
    SAMPLINGS,
    STEPS,
    frequent,
    load,
    prompts,
    respond,
    responses,
)

aten = torch.ops.aten
# operations that wait for a GPU: their results' sizes, or values, go to the host
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.equal,
}


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}


class Tape(TorchDispatchMode):
    """A CUDA graph in software: operations with the tensors and numbers that they were recorded
    with. As in a capture, recording changes no tensor that was there before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.inner: set[int] = set()  # storages made while recording
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        assert func.overloadpacket not in WAITING, func
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            dtypes = {x.dtype for x in tree_leaves(args[1]) if isinstance(x, Tensor)}
            assert torch.bool not in dtypes, "a mask as an index is a nonzero()"
        if func._schema.is_mutable:
            for key, storage in storages(args).items():
                if key not in self.inner:
                    self.before.setdefault(key, (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.inner |= storages(out).keys() - storages((args, kwargs)).keys()
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for old, x in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(x, Tensor) and not storages(x).keys() & storages(old).keys():
                    old.copy_(x)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs on a CPU, recorded on tapes, read every 4 tokens."""
    made: list[Tape] = []

    def record(call: Callable[[], None], pool: object) -> Tape:
        made.append(Tape())
        with patch.object(Tensor, "tolist", side_effect=AssertionError("a read")), made[-1]:
            call()
        for storage, old in made[-1].before.values():
            storage.copy_(old)
        return made[-1]

    class On(Graphs):
        def __init__(self, mesh: Mesh) -> None:
            super().__init__(mesh)
            self.on = True

    monkeypatch.setattr(decode_loop, "Graphs", On)
    monkeypatch.setattr(decode_loop, "capture", record)
    monkeypatch.setitem(PACES, "cpu", Pace(4, 8, 0.5))
    return made


@pytest.fixture(scope="module")
def llama(mesh: Mesh) -> tuple[list[nn.Module], Architecture]:
    return load("llama", mesh)


@pytest.mark.parametrize("name", ["greedy", *SAMPLINGS])
def test_replayed_steps_give_the_same_responses(
    mesh: Mesh,
    llama: tuple[list[nn.Module], Architecture],
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    rows, sampling = prompts("ragged"), SAMPLINGS.get(name, GREEDY)
    with monkeypatch.context() as eager:
        eager.setattr(decode_loop, "Graphs", Graphs)
        eos = frequent(responses(respond(*llama, mesh, rows, sampling, NEVER)))
        base = [respond(*llama, mesh, rows, sampling, end) for end in (eos, NEVER)]
    assert not tapes and len({len(row) for row in responses(base[0])}) > 1
    for end, expected in zip((eos, NEVER), base, strict=True):
        found = respond(*llama, mesh, rows, sampling, end)
        assert responses(found) == responses(expected)
        torch.testing.assert_close(
            found.generation_logprobs, expected.generation_logprobs, atol=1e-6, rtol=0
        )
    # 15 steps without an end: slots 16, 24 and 27, of which the first step is eager
    assert sum(tape.replays for tape in tapes[-3:]) == STEPS - 1 - 3
    assert len(tapes) > 3, "of the rows that end early, too"


def test_a_value_that_is_read_while_recording_is_found(tapes: list[Tape]) -> None:
    x = torch.arange(3)
    for read in (
        lambda: int(x.sum()),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: bool((x > 5).any()),
        lambda: x.index_put_((x > 1,), x[0]),
    ):
        with pytest.raises(AssertionError):
            decode_loop.capture(read, None)  # type: ignore[arg-type]
    assert len(tapes) == 5 and x.tolist() == [0, 1, 2]


def test_a_tape_repeats_numbers_and_reads_tensors() -> None:
    x, total, count = torch.tensor([1.0, 2.0]), torch.zeros(1), 5
    tape = Tape()
    with tape:
        total += (x * count).sum()
    for storage, old in tape.before.values():
        storage.copy_(old)
    assert total.item() == 0
    count = 7
    x[0] = 3
    tape.replay()
    tape.replay()
    assert total.item() == 2 * 5 * (3 + 2)


class Scripted:
    """`pick` with given tokens: one list per response token, of each row of the cache."""

    def __init__(self, *tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        return torch.tensor(next(self.tokens))[: len(logits)], torch.zeros(len(logits))


def test_the_first_token_that_is_not_finite_is_named(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows: prompts 3, 5, 1 of 12, 12 and 9 tokens. Of two bad tokens between two reads the first
    counts, and none behind a row's end."""
    rows, checked = prompts("ragged").select(torch.tensor([3, 5, 1])), 0
    for read in (1, 4, 16):
        monkeypatch.setitem(PACES, "cpu", Pace(read, 8, 0.0))
        script = Scripted([1, 1, 1], [9, 1, 1], [-1, 1, -1], [-1, -1, 2], *[[1, 1, 1]] * 12)
        monkeypatch.setattr(decode_loop, "pick", script)
        with pytest.raises(UserError, match=r"for samples \[7001\] at response token 2"):
            respond(*llama, mesh, rows, GREEDY, 9)
        ended = Scripted([1, 9, 1], [9, -1, 1], [-1, -1, 9], *[[-1, -1, -1]] * 13)
        monkeypatch.setattr(decode_loop, "pick", ended)
        assert responses(respond(*llama, mesh, rows, GREEDY, 9)) == [[1, 9], [9], [1, 1, 9]]
        last = Scripted(*[[1, 1, 1]] * (STEPS - 1), [1, -1, -1])
        monkeypatch.setattr(decode_loop, "pick", last)
        with pytest.raises(
            UserError, match=rf"samples \[7005, 7001\] at response token {STEPS - 1}"
        ):
            respond(*llama, mesh, rows, GREEDY, 9)
        checked += 1
    assert checked == 3


def test_rows_move_together(
    mesh: Mesh, llama: tuple[list[nn.Module], Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows, of which 0, 2 and 3 end first: half are left, so 4 and 5 move into the gaps."""
    monkeypatch.setitem(PACES, "cpu", Pace(1, 8, 0.5))
    sizes: list[int] = []
    step = Loop.step

    def spy(self: Loop, rows: int, slots: int) -> None:
        sizes.append(rows)
        if len(sizes) == 2:
            assert self.prompt[:3].tolist() == [4, 1, 5]
            assert self.positions[:3].tolist() == [n + 1 for n in (3, 12, 1)]
        step(self, rows, slots)

    monkeypatch.setattr(Loop, "step", spy)
    script = Scripted([1, 2, 3, 4, 5, 6], [9, 1, 9, 9, 1, 1], [7, 8, 9], *[[9, 9, 9]] * 2)
    monkeypatch.setattr(decode_loop, "pick", script)
    order = prompts("ragged").select(torch.tensor([3, 5, 1, 4, 0, 2]))  # longest first
    found = responses(respond(*llama, mesh, order, GREEDY, 9))
    assert found == [[1, 9], [2, 1, 8, 9], [3, 9], [4, 9], [5, 1, 7, 9], [6, 1, 9]]
    assert sizes == [6, 3, 3]


def test_numbers_of_rows_by_hand() -> None:
    halves = [_fewer(64, living, 0.5) for living in (64, 33, 32, 17, 16, 1, 0)]
    assert halves == [64, 64, 32, 32, 16, 1, 0]
    assert [_fewer(8, living, 7 / 8) for living in range(9)] == list(range(9))
    assert _fewer(64, 50, 7 / 8) == 56 and _fewer(64, 1, 0.0) == 64 and _fewer(5, 2, 0.5) == 2


def test_graphs_are_for_a_replica_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages between ranks stay outside of graphs."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    def on(device: str, parallel: Parallel) -> bool:
        place = SimpleNamespace(device=torch.device(device), parallel=parallel)
        return Graphs(cast(Mesh, place)).on

    assert on("cuda", Parallel())
    assert not on("cuda", Parallel(tensor=2)) and not on("cuda", Parallel(pipeline=2))
    assert not on("cpu", Parallel())
    assert PACES["cuda"].read == 16 and PACES.keys() == {"cpu", "cuda"}


def test_reads_of_a_generation(mesh: Mesh, llama: tuple[list[nn.Module], Architecture]) -> None:
    """16 tokens, a read before every fourth step: tokens and ends of the rows, four times."""
    tolist, reads = Tensor.tolist, []

    def count(x: Tensor) -> Any:
        reads.append(x.dtype)
        return tolist(x)

    with (
        patch.dict(PACES, cpu=Pace(4, 8, 0.5)),
        patch.object(Tensor, "tolist", count),
    ):
        respond(*llama, mesh, prompts("ragged"), Sampling(STEPS), NEVER)
    assert reads.count(torch.bool) == 4
