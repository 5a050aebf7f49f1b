"""Options of a study."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    seeds: int
    steps: int
    out: Path  # where cells.jsonl is
    docs: Path  # where tables and figure are written
    train: bool = True  # false: read the cells that there are
    workers: int = os.cpu_count() or 1  # of s3: runs at once
