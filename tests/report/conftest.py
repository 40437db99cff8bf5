"""A complete report, built once."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from helpers.samples import evaluation, manifest, profile, weight_traces

from edgemix.report import build_report


@pytest.fixture(scope="session")
def whole():
    """The report of a bundle with a student, an evaluation, weight traces and a profile."""
    return build_report(
        "experts",
        manifest(),
        evaluation=evaluation(),
        traces=weight_traces(),
        profile=profile(),
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    )
