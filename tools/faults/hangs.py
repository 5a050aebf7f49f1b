"""A rank that hangs: all others end, and name it with its last phase; the same command continues."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.faults import runs, world
from tools.faults.systems import LAYOUTS, SYSTEMS, System, prepare
from tools.faults.trial import Bench, Trial, expect

STOPPED = "a rank is stopped"
STUCK = "a rank does something that does not end"
SURVIVED = {
    STOPPED: "the others end with exit code 2 and one message: the rank, its process, its last"
    " phase; the same command continues to the same bits",
    STUCK: "the others end with exit code 2 and one message: each rank's last phase and line",
}
TIMEOUT = 2.0  # seconds
WORDS = f"parallel.timeout={TIMEOUT:g}"
SECONDS = 60  # of a world whose rank hangs
