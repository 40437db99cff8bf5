"""Background load counts other processes and not this one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgemix.runtime.profiling import background_load


class Times(SimpleNamespace):
    def _asdict(self):
        return vars(self)


@pytest.mark.parametrize(
    ("busy", "own", "share"), [(10.0, 10.0, 0.0), (10.0, 4.0, 0.3), (4.0, 10.0, 0.0), (100.0, 0.0, 1.0)]
)
def test_share_of_other_processes(monkeypatch, busy, own, share):
    now = SimpleNamespace(seconds=0.0, busy=50.0, own=7.0)
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=now.own, system=0.0))
    times = SimpleNamespace(
        cpu_count=lambda: 2,
        cpu_times=lambda: Times(user=now.busy, idle=now.seconds, iowait=5 * now.seconds),
        Process=lambda: process,
    )
    monkeypatch.setattr(background_load, "psutil", times)
    monkeypatch.setattr(background_load.time, "perf_counter", lambda: now.seconds)
    watched = background_load.BackgroundLoad()

    now.seconds, now.busy, now.own = 10.0, 50.0 + busy, 7.0 + own

    assert watched.share() == pytest.approx(share)
