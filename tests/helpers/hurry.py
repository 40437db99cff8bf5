"""Profiles that take a second, for tests of what is done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.runtime.profiling import limits, profiler
from edgemix.runtime.profiling.bench import Sizes

if TYPE_CHECKING:
    import pytest


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Let `--quick` be far quicker: one load, few tokens, small matrices."""
    patch.setattr(limits, "SIDE", 32)
    patch.setattr(limits, "MIN_BUFFER", 1 << 16)
    patch.setattr(limits, "MAX_BUFFER", 1 << 16)
    settings = profiler.MeasurementSettings(
        seconds=30,
        more=10,
        limits=0.01,
        loads=(0, 1),
        each=(0, 0),
        loaded=0.5,
        turns=0.6,
        operators=0.9,
        sizes=Sizes((8,), (12,), (2,), tokens=6, texts=1, all_targets=True, patience=1.0),
    )
    patch.setattr(profiler, "QUICK", settings)
