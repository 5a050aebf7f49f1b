from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.roles import SingleReplica
from gipo_megatron.telemetry.metrics import PhaseTimer, memory_metrics, reduce_metrics


class Replicas:
    """Data parallel over threads: every reduction meets at a barrier, so a wrong number of
    collectives shows as a timeout."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[str] = []
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Tensor] = [torch.zeros(0)] * size

    def meet(self, rank: int, x: Tensor, combine: Callable[[Tensor], Tensor], name: str) -> Tensor:
        self._slots[rank] = x
        self._barrier.wait()
        result = combine(torch.stack(self._slots))
        if rank == 0:
            self.calls.append(name)
        self._barrier.wait()
        return result

    def run(self, task: Callable[[Replica], object]) -> list[object]:
        results: list[object] = [None] * self.size

        def body(rank: int) -> None:
            try:
                results[rank] = task(Replica(self, rank))
            except AssertionError as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(r,)) for r in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        return results


class Replica:
    def __init__(self, group: Replicas, rank: int) -> None:
        self._group, self.rank, self.size = group, rank, group.size

    def sum(self, x: Tensor) -> Tensor:
        return self._group.meet(self.rank, x, lambda s: s.sum(0), "sum")

    def max(self, x: Tensor) -> Tensor:
        # like back ends that drop NaN
        return self._group.meet(self.rank, x, lambda s: s.nan_to_num(nan=-torch.inf).amax(0), "max")


def metrics_of(x: Tensor, y: Tensor) -> Metrics:
    return {
        "a/sum": Metric.sum(x),
        "a/min": Metric.min(x),
        "a/mean": Metric.mean(x, y.abs()),
        "a/max": Metric.max(x),
        "a/std": Metric.std(x),
        "a/corr": Metric.correlation(x, y),
        "a/ev": Metric.explained_variance(y, x),
        "b/max": Metric.max(y),
    }


def test_three_replicas_give_the_statistics_of_all_rows() -> None:
    noise = np.random.Generator(np.random.PCG64(1))
    x, y = noise.standard_normal(30), noise.standard_normal(30)
    replicas = Replicas(3)
    results = replicas.run(
        lambda dp: reduce_metrics(
            metrics_of(torch.tensor(x[dp.rank :: 3]), torch.tensor(y[dp.rank :: 3])), dp
        )
    )
    expected = {
        "a/sum": x.sum(),
        "a/min": x.min(),
        "a/mean": (x * np.abs(y)).sum() / np.abs(y).sum(),
        "a/max": x.max(),
        "a/std": x.std(),
        "a/corr": np.corrcoef(x, y)[0, 1],
        "a/ev": 1 - np.var(y - x) / np.var(y),
        "b/max": y.max(),
    }
    for result in results:
        assert result == pytest.approx(expected, rel=1e-12)
        assert list(result) == list(expected)
    assert replicas.calls == ["max", "sum", "max"]  # layout, everything that adds, both extremes


def test_one_replica_needs_no_reduction_and_may_have_no_metrics() -> None:
    x = torch.tensor([1.0, 2.0, 6.0])
    values = reduce_metrics({"m": Metric.mean(x), "low": Metric.min(x)}, SingleReplica())
    assert values == {"m": 3.0, "low": 1.0}
    assert reduce_metrics({}, SingleReplica()) == {}


def test_nan_in_an_extreme_survives_a_maximum_that_drops_it() -> None:
    rows = [torch.tensor([1.0, float("nan")]), torch.tensor([2.0, 3.0])]
    results = Replicas(2).run(
        lambda dp: reduce_metrics(
            {"x/max": Metric.max(rows[dp.rank]), "y/min": Metric.min(rows[1])}, dp
        )
    )
    for result in results:
        assert np.isnan(result["x/max"]) and result["y/min"] == 2.0


def test_replicas_with_different_metrics_all_fail_and_name_them() -> None:
    one = Metric.sum(1.0)
    held: list[Metrics] = [{"loss": one, "source/hh/score": one}, {"loss": one}]
    results = Replicas(2).run(lambda dp: reduce_metrics(held[dp.rank], dp))
    assert all(isinstance(r, AssertionError) for r in results)
    assert (
        "replica 0 of 2" in str(results[0])
        and "source/hh/score" in str(results[0])
        and "loss" not in str(results[0])
    )
    assert "the others have more metrics" in str(results[1])


def test_same_names_in_another_order_or_kind_fail() -> None:
    one = Metric.sum(1.0)
    for held in (
        [{"a": one, "b": one}, {"b": one, "a": one}],
        [{"a": one}, {"a": Metric.max(torch.ones(1))}],
    ):
        results = Replicas(2).run(lambda dp, held=held: reduce_metrics(held[dp.rank], dp))
        assert all(isinstance(r, AssertionError) for r in results)


def test_phases_add_up_and_an_inner_phase_stops_the_outer() -> None:
    now = [0.0]
    seen: list[str] = []
    timer = PhaseTimer(seen.append, clock=lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    work(1)
    with timer.phase("rollout"):
        work(2)
        with timer.phase("score"):
            work(4)
        work(8)
    with timer.phase("rollout"):
        work(16)
    work(32)
    values = reduce_metrics(timer.metrics(), SingleReplica())
    assert values == {"time/step_seconds": 63.0, "time/rollout": 26.0, "time/score": 4.0}
    assert seen == ["rollout", "score", "rollout", "", "rollout", ""]
    work(5)
    assert reduce_metrics(timer.metrics(), SingleReplica()) == {"time/step_seconds": 5.0}


def test_padding_of_each_pass_and_of_all() -> None:
    """Two updates of 100 tokens with 5 and 15 of padding, a pass of 300 with 100; then nothing."""
    timer = PhaseTimer(lambda phase: None, clock=lambda: 0.0)
    for role, kind, real, whole in (
        ("actor", "update", 95, 100),
        ("actor", "update", 85, 100),
        ("reward", "forward", 200, 300),
    ):
        timer.count(role, kind, real, whole)
    values = reduce_metrics(timer.metrics(), SingleReplica())
    assert values == {
        "time/step_seconds": 0.0,
        "perf/padding": pytest.approx(120 / 500),
        "perf/padding/actor_update": pytest.approx(0.1),
        "perf/padding/reward_forward": pytest.approx(1 / 3),
    }
    assert reduce_metrics(timer.metrics(), SingleReplica()) == {"time/step_seconds": 0.0}


def test_a_phase_ends_when_its_work_raises() -> None:
    seen: list[str] = []
    timer = PhaseTimer(seen.append)
    with pytest.raises(KeyError), timer.phase("update"):
        raise KeyError("x")
    assert seen == ["update", ""]


def test_host_memory_is_that_of_this_process() -> None:
    values = reduce_metrics(memory_metrics(), SingleReplica())
    assert 0.05 < values["memory/host_rss_gib"] < 64
