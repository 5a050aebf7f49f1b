"""Signals that end a run in order."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

# seconds; torchrun forwards a terminal's Ctrl-C, so every worker sees one press twice
REPEATED_SIGNAL = 2.0


class Interrupt:
    """SIGTERM, SIGUSR1 and the first Ctrl-C end the run after the step and a checkpoint; a second
    Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.name = ""
        self._pressed = -math.inf
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.name and now - self._pressed > REPEATED_SIGNAL:
                raise KeyboardInterrupt
            self._pressed = now
        self.name = self.name or signal.Signals(number).name
