"""A bundle's report: one self-contained HTML page. Needs the extra `report` (Altair)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from edgemix.report.build import build_report as build_report

__all__ = ["build_report"]


def __getattr__(name: str) -> object:
    if name == "build_report":
        try:
            from edgemix.report.build import build_report
        except ImportError as error:
            raise EdgemixError(
                f"a report needs {error.name}, which is not installed", "pip install 'edgemix[report]'"
            ) from None
        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
