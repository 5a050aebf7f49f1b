from __future__ import annotations

from gipo_megatron.data.examples import Tally


def test_a_tally_counts_by_reason_and_keeps_the_first_place() -> None:
    tally = Tally(kept=3)
    for where in ("line 2", "line 5"):
        tally.drop("empty", where)
    tally.change("mark removed", "line 1")
    assert tally.read == 5
    assert tally.lines() == [
        "kept 3 of 5 rows",
        "dropped 2: empty (first: line 2)",
        "changed 1: mark removed (first: line 1)",
    ]
