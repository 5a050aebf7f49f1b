"""Over-optimisation of a run: how far its held-out gold reward ends below its peak."""

from __future__ import annotations

from gipo_megatron.reports.pages import number
from gipo_megatron.reports.runs import RunFolder


def gold_course(run: RunFolder) -> str:
    """Return `peak … at step …, final …, lost …` of eval/gold; "" for a run without it.

    Lost is peak - final: 0 where the last evaluation is the best one.
    """
    steps, values = run.series("eval/gold")
    if not values:
        return ""
    peak, final = max(values), values[-1]
    step = steps[values.index(peak)]
    return f"peak {number(peak)} at step {step}, final {number(final)}, lost {number(peak - final)}"
