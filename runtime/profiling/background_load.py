"""How much of the processor others took meanwhile: figures that were measured beside them are theirs, too."""

from __future__ import annotations

import time

import psutil

BOTHERSOME = 0.05
"""Share of all cores above which a reader should know."""


class Neighbours:
    """Watches from when it is made."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.perf_counter(), _busy(), _own()

    def share(self) -> float:
        """Of all cores' time since then, what other processes took; systems count in hundredths of a second."""
        whole = (time.perf_counter() - self._begun) * (psutil.cpu_count() or 1)
        others = (_busy() - self._busy) - (_own() - self._own)
        return min(1.0, max(0.0, others / whole)) if whole > 0 else 0.0


def _busy() -> float:
    """Seconds that all cores have worked, for anybody."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user's time already
    return float(sum(seconds for name, seconds in times.items() if name not in idle))


def _own() -> float:
    """Seconds that this process and its children that have ended have worked."""
    times = psutil.Process().cpu_times()
    own = times.user + times.system
    return float(own + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))
