"""Statistics that training, reports and evaluation share."""

from __future__ import annotations

import numpy as np


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    """
    centre = share + z * z / (2 * count)
    half = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Pearson's r; None for fewer than three points, or if x or y is constant."""
    if len(x) < 3 or any(np.ptp(v) <= 1e-12 * max(1.0, np.abs(v).max()) for v in (x, y)):
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))
