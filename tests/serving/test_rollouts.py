"""Rollouts from a server that loses answers, dies and mixes versions, in one process: ranks are
threads, and the server is a few lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gipo_megatron.errors import SamplerLost, UserError
from gipo_megatron.serving import server as server_module
from gipo_megatron.serving.client import Answer, Needed, Request, ServerLost
from gipo_megatron.serving.rollouts import ServerRollouts, request_seed, requests
from gipo_megatron.serving.server import Server
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts, Rollout

END, PAD = 2, 0
SEED = 3954129997311566352  # half of what `printf '3 5 17' | b2sum -l 64` prints
ROWS = 6
SAMPLING = Sampling(max_response=4, temperature=0.5, top_k=3, top_p=0.9, seed=3, step=5)


def answer(request: Request, version: str) -> Answer:
    """Tokens that depend on the prompt and the seed; every other response ends early."""
    base = sum(request.token_ids) + request.sampling["seed"]
    length = 1 + base % request.sampling["max_tokens"]
    tokens = [3 + (base + k) % 5 for k in range(length)]
    ends = length < request.sampling["max_tokens"]
    if ends:
        tokens[-1] = request.sampling["stop_token_ids"][0]
    logprobs = tuple(-0.5 * (k + 1) for k in range(length))
    return Answer(tuple(tokens), logprobs, "stop" if ends else "length", version)


@dataclass
class Fleet:
    """All servers of a test, one after the other. `faults`: what each generate call does, in
    order; the calls after them do nothing wrong."""

    faults: list[Callable[[Fleet, dict[int, Answer]], None]] = field(default_factory=list)
    push_faults: list[Exception] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)  # requests of each call
    pushed: list[tuple[str, list[str]]] = field(default_factory=list)  # server, names
    starts: int = 0
    stops: int = 0
    version: str = "default"
    lines: list[str] = field(default_factory=list)
    taken: dict[int, int] = field(default_factory=dict)  # rank -> tensors of its last export


@dataclass
class StubClient:
    fleet: Fleet
    url: str

    def check(self, needed: Needed) -> None:
        if self.url == "http://gone":
            raise ServerLost("connection refused")

    def close(self) -> None:
        pass

    def generate(self, wanted: Sequence[Request], answers: dict[int, Answer]) -> None:
        missing = [i for i in range(len(wanted)) if i not in answers]
        self.fleet.asked.append(missing)
        for i in missing:
            answers[i] = answer(wanted[i], self.fleet.version)
        if self.fleet.faults:
            self.fleet.faults.pop(0)(self.fleet, answers)


@dataclass
class StubTransfer:
    fleet: Fleet

    def push(self, client: StubClient, weights: Iterator[Any], version: str) -> None:
        names = []
        for name, _ in weights:
            names.append(name)
            time.sleep(0.01)
            # no rank waits in the next tensor's collective
            assert max(self.fleet.taken.values(), default=0) <= len(names)
        if self.fleet.push_faults:
            raise self.fleet.push_faults.pop(0)
        self.fleet.version = version
        self.fleet.pushed.append((client.url, names))

    def close(self) -> None:
        pass


@dataclass
class StubProcess:
    fleet: Fleet

    def start(self) -> str:
        self.fleet.starts += 1
        self.fleet.version = "default"
        return f"http://server{self.fleet.starts}"

    def stop(self) -> None:
        self.fleet.stops += 1

    def failure(self, what: str) -> UserError:
        return UserError(f"{what}; its last lines: …", where="server.log", fix="read the log")


def lose(keep: int) -> Callable[[Fleet, dict[int, Answer]], None]:
    """The server dies when `keep` answers are there."""

    def fault(fleet: Fleet, answers: dict[int, Answer]) -> None:
        for index in [*answers][keep:]:
            del answers[index]
        raise ServerLost("connection reset")

    return fault


def mix(fleet: Fleet, answers: dict[int, Answer]) -> None:
    """Two answers are of other weights."""
    for index in (2, 4):
        old = answers[index]
        answers[index] = Answer((9, 9), (-9.0, -9.0), old.finish, "default")


class StubActor:
    end_ids = (END, 7)

    def __init__(self, taken: dict[int, int] | None = None, rank: int = 0) -> None:
        self.version, self.exported = 0, 0
        self._taken, self._rank = taken, rank

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for count, name in enumerate("ab", 1):
            if self._taken is not None:
                self._taken[self._rank] = count
            yield name, torch.zeros(1)
        self.exported += 1
        if self._taken is not None:
            self._taken[self._rank] = 0


class Rank:
    """One thread of a world of `replicas` × `each` ranks."""

    def __init__(self, rank: int, each: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.is_main, self.replica = rank == 0, rank // each
        self.rank, self._each, self._barrier, self._slots = rank, each, barrier, slots

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots[:: self._each])
        self._barrier.wait()
        return found

    def from_main(self, action: Callable[[], Any]) -> Any:
        outcome: Any = None
        if self.is_main:
            try:
                outcome = action()
            except UserError as error:
                outcome = error
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome


def prompts(rows: Sequence[int] = range(ROWS)) -> Prompts:
    ids = torch.tensor(rows)
    lengths = 1 + ids % 3
    tokens = 10 + ids[:, None] * 3 + torch.arange(3)
    return Prompts(
        tokens=torch.where(torch.arange(3) < lengths[:, None], tokens, PAD),
        lengths=lengths,
        prompt_id=ids,
        sample_id=100 + ids,
        source=("x",) * len(ids),
        extras=({},) * len(ids),
    )


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    made = Fleet()
    monkeypatch.setattr(server_module, "Client", lambda url, timeout: StubClient(made, url))
    return made


def rank_rollouts(fleet: Fleet, world: Any, restarts: int = 2, url: str = "") -> ServerRollouts:
    needed = Needed(8, 40, 16, 2, "text", [1])
    process: Any = None if url else StubProcess(fleet)
    transfer: Any = StubTransfer(fleet)
    server = Server(needed, transfer, process, url, 5.0, restarts, fleet.lines.append)
    if world.is_main:
        server.start()
    return ServerRollouts(world, server, torch.device("cpu"), PAD, lambda ids: f"{ids}")


def alone(fleet: Fleet, **settings: Any) -> ServerRollouts:
    return rank_rollouts(fleet, Rank(0, 1, threading.Barrier(1), [None]), **settings)


def expected(fleet: Fleet, rows: Sequence[int]) -> Rollout:
    """The rollout of rows that nothing disturbs; the fleet is then as before."""
    actor: Any = StubActor()
    rollout = alone(fleet).respond(actor, prompts(rows), SAMPLING)
    vars(fleet).update(vars(Fleet()))
    return rollout


def same(one: Rollout, other: Rollout) -> bool:
    return (
        one.response_text == other.response_text
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.finished, other.finished)
        and one.generation_logprobs is not None
        and other.generation_logprobs is not None
        and torch.equal(one.generation_logprobs, other.generation_logprobs)
    )


def test_a_response_is_what_was_answered(fleet: Fleet) -> None:
    actor: Any = StubActor()
    given = prompts()
    rollout = alone(fleet).respond(actor, given, SAMPLING)
    wanted = requests(given, SAMPLING, actor.end_ids)
    assert rollout.generation_logprobs is not None
    checked, ended = 0, 0
    for row, request in enumerate(wanted):
        wished = answer(request, "")
        start, stop = int(given.lengths[row]), int(rollout.lengths[row])
        assert rollout.tokens[row, :start].tolist() == list(request.token_ids)
        assert rollout.tokens[row, start:stop].tolist() == list(wished.token_ids)
        assert rollout.generation_logprobs[row, start:stop].tolist() == list(wished.logprobs)
        assert bool(rollout.finished[row]) == (wished.finish == "stop")
        checked, ended = checked + 1, ended + (wished.finish == "stop")
    assert checked == ROWS and 0 < ended < ROWS


def test_a_request_has_every_setting() -> None:
    found = requests(prompts(), SAMPLING, (END, 7))
    seeds = {request.sampling.pop("seed") for request in found}
    assert len(seeds) == ROWS and all(0 <= seed < 2**63 for seed in seeds)
    assert found[4].token_ids == [22, 23]
    settings = {
        "max_tokens": 4,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": [END, 7],
        "logprobs": 0,
        "detokenize": False,
    }
    assert all(request.sampling == settings for request in found)
    assert request_seed(SAMPLING, 17) == SEED


def test_weights_are_pushed_when_they_changed(fleet: Fleet) -> None:
    rollouts, actor, other = alone(fleet), StubActor(), StubActor()

    def pushes(responder: Any) -> int:
        rollouts.respond(responder, prompts(), SAMPLING)
        return len(fleet.pushed)

    assert [pushes(actor), pushes(actor)] == [1, 1]
    actor.version += 1
    assert [pushes(actor), pushes(other), pushes(other), pushes(actor)] == [2, 3, 3, 4]
    assert fleet.pushed[0] == ("http://server1", ["a", "b"]) and fleet.starts == 1


def test_after_a_loss_only_what_is_missing_is_drawn_again(fleet: Fleet) -> None:
    undisturbed = expected(fleet, range(ROWS))
    rollouts = alone(fleet)
    actor: Any = StubActor()
    fleet.faults = [lose(keep=2), mix]
    found = rollouts.respond(actor, prompts(), SAMPLING)
    assert same(found, undisturbed)
    # two answers were there before the loss; then two of other weights are refused
    assert fleet.asked == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 4]]
    assert [name for name, _ in fleet.pushed] == [f"http://server{i}" for i in (1, 2, 3)]
    assert (fleet.starts, fleet.stops) == (3, 2) and len(fleet.lines) == 2
    assert "restart 1 of 2" in fleet.lines[0] and "another program" in fleet.lines[1]


def test_restarts_are_counted_over_the_whole_run(fleet: Fleet) -> None:
    rollouts = alone(fleet)
    actor: Any = StubActor()
    for keep in (0, 3):
        fleet.faults = [lose(keep)]
        rollouts.respond(actor, prompts(), SAMPLING)
    fleet.faults = [lose(3)]
    with pytest.raises(SamplerLost) as lost:
        rollouts.respond(actor, prompts(), SAMPLING)
    assert "lost, and its restarts (2) are used up" in str(lost.value)
    assert "connection reset" in str(lost.value) and "the same command continues" in str(lost.value)


def test_a_push_that_fails_is_repeated_on_another_server(fleet: Fleet) -> None:
    rollouts = alone(fleet)
    actor: Any = StubActor()
    fleet.push_faults = [ServerLost("out of memory")]
    rollouts.respond(actor, prompts(), SAMPLING)
    assert [name for name, _ in fleet.pushed] == ["http://server2"] and actor.exported == 2


@pytest.mark.parametrize(("replicas", "each"), [(2, 1), (1, 2), (2, 2)])
def test_every_replica_gets_its_own_rows(fleet: Fleet, replicas: int, each: int) -> None:
    """Losses included."""
    shares = [range(replica, ROWS, replicas) for replica in range(replicas)]
    undisturbed = [expected(fleet, rows) for rows in shares]
    fleet.faults, fleet.push_faults = [lose(1), mix], [ServerLost("amid a push")]

    def work(world: Rank) -> tuple[Rollout, int]:
        actor: Any = StubActor(fleet.taken, world.rank)
        rollouts = rank_rollouts(fleet, world, restarts=3)
        own = prompts(shares[world.replica])
        return rollouts.respond(actor, own, SAMPLING), actor.exported

    found = on_threads(replicas, each, work)
    for rank, (rollout, exported) in enumerate(found):
        assert same(rollout, undisturbed[rank // each])
        assert exported == 4  # one, and one for each loss
    assert len(found) == replicas * each


@pytest.mark.parametrize("fault", ["push", "loss"])
def test_an_error_ends_all_ranks_alike(fleet: Fleet, fault: str) -> None:
    if fault == "push":
        fleet.push_faults = [UserError("no room", where="/dev/shm", fix="make room")]
    else:
        fleet.faults = [lose(1)] * 2

    def work(world: Rank) -> str:
        actor: Any = StubActor()
        rollouts = rank_rollouts(fleet, world, restarts=1)
        with pytest.raises(SamplerLost) as lost:
            rollouts.respond(actor, prompts(), SAMPLING)
        return str(lost.value)

    found = on_threads(2, 2, work)
    reason = "no room" if fault == "push" else "restarts (1) are used up"
    assert len({*found}) == 1 and reason in found[0]


def test_a_server_that_is_not_there_is_no_loss(fleet: Fleet) -> None:
    with pytest.raises(UserError, match="connection refused") as error:
        alone(fleet, url="http://gone")
    assert error.value.where == "http://gone" and not isinstance(error.value, SamplerLost)


def on_threads(replicas: int, each: int, work: Callable[[Rank], Any]) -> list[Any]:
    """Results in rank order."""
    world = replicas * each
    barrier, slots, results = threading.Barrier(world, timeout=30), [None] * world, [None] * world
    errors: list[BaseException] = []

    def target(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, each, barrier, slots))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results
