"""Energy counters: the processor's packages (RAPL) and NVIDIA's cards (NVML)."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Joules = Mapping[str, float]

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """An energy counter.

    Attributes:
        name: The device that it measures.
    """

    name: str

    def spent(self, before: float, after: float) -> float:
        """Return the joules between two readings."""

    def read(self) -> float | None:
        """Return joules since an arbitrary time; None where the counter cannot be read any more."""


class Rapl:
    """A CPU package's counter, which wraps around at its range (Linux's powercap interface).

    Args:
        folder: Such as /sys/class/powercap/intel-rapl:0.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.name = (folder / "name").read_text("utf-8").strip()
        self._range = int((folder / "max_energy_range_uj").read_text("utf-8")) / 1e6

    def read(self) -> float | None:
        with suppress(OSError, ValueError):
            return int(self._file.read_text("utf-8")) / 1e6
        return None

    def spent(self, before: float, after: float) -> float:
        return after - before if after >= before else after - before + self._range


class Nvml:
    """An NVIDIA GPU's counter, through the package pynvml."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._card = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(self._card)
        self.name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)

    def read(self) -> float | None:
        with suppress(self._nvml.NVMLError):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)) / 1e3
        return None

    def spent(self, before: float, after: float) -> float:
        return after - before


def counters(powercap: Path = POWERCAP) -> list[Counter]:
    """Return the counters that can be read here, by distinct names; usually only root may read RAPL."""
    found: dict[str, Counter] = {}
    for counter in (*_packages(powercap), *_cards()):
        if counter.read() is not None:
            found.setdefault(counter.name, counter)
    return list(found.values())


def _packages(powercap: Path) -> Iterable[Counter]:
    """Yield the packages (intel-rapl:0), not the zones within them (intel-rapl:0:0), which they include."""
    with suppress(OSError):
        for folder in sorted(powercap.glob("*:*")):
            if folder.name.count(":") == 1:
                with suppress(OSError, ValueError):
                    yield Rapl(folder)


def _cards() -> Iterable[Counter]:
    if find_spec("pynvml") is None:
        return
    nvml = import_module("pynvml")
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            with suppress(nvml.NVMLError):
                yield Nvml(nvml, index)


class Meter:
    """Readings of counters before and after some work."""

    def __init__(self, counters: Iterable[Counter]) -> None:
        self.counters = tuple(counters)

    def readings(self) -> list[float | None]:
        """Return the current reading of every counter."""
        return [counter.read() for counter in self.counters]

    def spent(self, before: list[float | None]) -> dict[str, float]:
        """Return the joules since some readings, by counter name."""
        return {
            counter.name: counter.spent(was, now)
            for counter, was, now in zip(self.counters, before, self.readings(), strict=True)
            if was is not None and now is not None
        }
