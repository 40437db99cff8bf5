"""A whole report, made once."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from helpers.samples import evaluation, manifest, passages, profile

from edgemix.report import build_report


@pytest.fixture(scope="session")
def whole():
    """Of a bundle with everything."""
    return build_report(
        "experts",
        manifest(),
        evaluation=evaluation(),
        passages=passages(),
        profile=profile(),
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    )
