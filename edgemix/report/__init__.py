"""A bundle's report: one HTML page that needs nothing else, from plain data. Needs the extra `report` (Altair)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemix.report.page import build_report as build_report

__all__ = ["build_report"]


def __getattr__(name: str) -> object:
    if name == "build_report":
        from edgemix.report.page import build_report

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
