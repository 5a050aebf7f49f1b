"""Modules that the fork server imports once for tests."""

from __future__ import annotations

import tests.parity.worker  # noqa: F401
import tools.faults.preloaded  # noqa: F401
