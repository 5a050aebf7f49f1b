"""Part `budget`: an SFT update on lengths like HH's, in micro-batches of four rows, and of as
many tokens as four of the longest rows have."""

from __future__ import annotations

from collections.abc import Iterator

from tools.benchmark_padding import like_hh, loss, padding
from tools.gpu.bench import Bench, Figure, below, figure
from tools.gpu.models import ONE_B, Step, shape, trained_actor

ROWS, LONGEST = 64, 1036
FASTER = 1.05  # than four rows, from the tokens that are saved and from fewer micro-batches


def budget(bench: Bench) -> Iterator[Figure]:
    architecture = shape(ONE_B, bench.tiny)
    rows = like_hh(8 if bench.tiny else ROWS, architecture.vocab_size)
    actor = trained_actor(bench.mesh, Step(architecture, len(rows), 4, LONGEST))
    seconds, shares = [], []
    limits: dict[str, tuple[int | None, int | None]] = {
        "rows": (4, None),
        "tokens": (None, 4 * LONGEST),
    }
    for name, limit in limits.items():
        actor.engine.micro_batch, actor.engine.micro_tokens = limit
        count, share = padding(actor.engine, rows)
        shares.append(share)
        seconds.append(bench.seconds(lambda: actor.update((rows, loss)), repeats=3))
        yield figure(f"by {name}: micro-batches", count)
        yield figure(f"by {name}: share of padding", share)
        yield figure(f"by {name}: ms", 1000 * seconds[-1])
    yield below("padding by tokens, of that by rows", shares[1] / shares[0], 1.0)
    yield bench.fast("times faster by tokens", seconds[0] / seconds[1], FASTER)
