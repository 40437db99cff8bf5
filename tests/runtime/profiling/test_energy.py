"""Energy counters, read from files in place of the system's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from edgemix.runtime.profiling.energy import Meter, counters


@pytest.fixture
def powercap(tmp_path):
    """A package, a zone within it, a package that cannot be read, and a folder that is not a zone."""
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "package-1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("10000000\n")
        (tmp_path / folder / "energy_uj").write_text("9000000\n")
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_are_counted_and_zones_within_them_are_not(powercap):
    assert [counter.name for counter in counters(powercap)] == ["package-0"]


def test_joules_between_two_readings(powercap):
    meter = Meter(counters(powercap))
    before = meter.readings()

    (powercap / "intel-rapl:0/energy_uj").write_text("9500000")

    assert meter.spent(before) == {"package-0": pytest.approx(0.5)}


def test_a_counter_wraps_around_at_its_range(powercap):
    meter = Meter(counters(powercap))
    before = meter.readings()

    (powercap / "intel-rapl:0/energy_uj").write_text("1500000")

    assert meter.spent(before) == {"package-0": pytest.approx(2.5)}


@pytest.mark.parametrize("content", ["", "no number", None])
def test_a_counter_that_becomes_unreadable_is_left_out(powercap, content):
    meter = Meter(counters(powercap))
    before = meter.readings()
    file = powercap / "intel-rapl:0/energy_uj"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)

    assert meter.spent(before) == {}


def test_no_counters(tmp_path):
    meter = Meter(counters(tmp_path / "nothing"))

    assert meter.spent(meter.readings()) == {}


def test_gpus_are_counted_through_pynvml(tmp_path, monkeypatch):
    class NVMLError(Exception):
        pass

    energy = iter([1000, 1000, 1500, 4000])

    def total(card):
        if card == 1:
            raise NVMLError("not supported")
        return next(energy)

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda card: f"Card {card}",
        nvmlDeviceGetTotalEnergyConsumption=total,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    meter = Meter(counters(tmp_path))

    assert [counter.name for counter in meter.counters] == ["Card 0"]
    assert meter.spent(meter.readings()) == {"Card 0": 2.5}
