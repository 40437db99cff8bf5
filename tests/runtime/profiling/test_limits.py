"""The machine's limits: the graphs compute what they should, and the buffer is of a sensible size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgemix.runtime.graphs.providers import PROVIDERS, open_bytes
from edgemix.runtime.profiling import limits


@pytest.mark.parametrize(
    ("graph", "left", "result"),
    [(limits.fp32_product, np.float32, np.float32), (limits.int8_product, np.uint8, np.int32)],
)
def test_graphs_compute_matrix_products(monkeypatch, graph, left, result):
    monkeypatch.setattr(limits, "SIDE", 32)
    encoded = graph()
    onnx.checker.check_model(onnx.load_from_string(encoded))
    given = np.random.default_rng(0).integers(0, 9, (32, 32)).astype(left)

    (product,) = open_bytes(encoded, PROVIDERS["cpu"], threads=1).run(None, {"a": given})

    assert product.dtype == result
    assert np.array_equal(product, given.astype(np.int64) @ np.ones((32, 32), np.int64))


def test_all_limits_of_a_cpu_are_measured(monkeypatch):
    monkeypatch.setattr(limits, "SIDE", 32)
    monkeypatch.setattr(limits, "MIN_BUFFER", 1 << 16)
    monkeypatch.setattr(limits, "MAX_BUFFER", 1 << 16)

    found = limits.measure_limits(PROVIDERS["cpu"], 2, seconds=0.01)

    assert found.bandwidth > 0
    assert found.fp32_peak > 0
    assert found.int8_peak > 0


def test_an_operator_that_the_provider_lacks_has_no_peak():
    assert limits._peak(b"no graph", np.float32, PROVIDERS["cpu"], 1, 0.01) is None


def test_the_last_cache_is_the_largest(tmp_path):
    for index, size in enumerate(("48K", "2048K", "32768K", "unknown")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/size").write_text(f"{size}\n")

    assert limits.last_cache(tmp_path) == 32 << 20
    assert limits.last_cache(tmp_path / "none") > 0


def test_the_buffer_is_larger_than_the_cache_and_not_more_than_memory():
    assert limits.MIN_BUFFER <= limits.buffer_bytes(40 << 20) <= limits.MAX_BUFFER
    assert limits.buffer_bytes(1 << 50) <= limits.MAX_BUFFER
    assert limits.buffer_bytes(1) % 8 == 0
