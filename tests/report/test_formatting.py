"""Numbers and names as text."""

from __future__ import annotations

import pytest

from edgemix.report import formatting


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (formatting.seconds(1.5), "1.50 s"),
        (formatting.seconds(0.0149), "14.9 ms"),
        (formatting.seconds(0.00002), "20.0 µs"),
        (formatting.size(418_000_000), "418 MB"),
        (formatting.size(25_000_000_000), "25.0 GB"),
        (formatting.size(1_234_567), "1.2 MB"),
        (formatting.size(900), "900 B"),
        (formatting.count(134_515_008), "134.5 M"),
        (formatting.digits(9.996), "10.0"),
        (formatting.digits(99.96), "100"),
        (formatting.name("a\n b"), "a b"),
        (formatting.name("x" * 70), "x" * 63 + "…"),
        (formatting.join(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_figures_as_text(said, shown):
    assert said == shown
