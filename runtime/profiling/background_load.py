"""The share of the processor that other processes use during a measurement."""

from __future__ import annotations

import time

import psutil

NOTABLE_LOAD = 0.05
"""Share of all cores above which a profile has a note about it."""


class BackgroundLoad:
    """Measures the load by other processes since it was created."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.perf_counter(), _busy(), _own()

    def share(self) -> float:
        """Return other processes' share of all cores' time since then; systems count hundredths of a second."""
        whole = (time.perf_counter() - self._begun) * (psutil.cpu_count() or 1)
        others = (_busy() - self._busy) - (_own() - self._own)
        return min(1.0, max(0.0, others / whole)) if whole > 0 else 0.0


def _busy() -> float:
    """Return the seconds that all cores have been busy."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user's time already
    return float(sum(seconds for name, seconds in times.items() if name not in idle))


def _own() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = psutil.Process().cpu_times()
    own = times.user + times.system
    return float(own + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))
