"""The machine's limits: memory bandwidth, and peak matrix multiplication in ONNX Runtime."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from edgemix.bundle import protobuf
from edgemix.runtime.graphs.providers import onnxruntime_errors, open_bytes, run_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.providers import Provider

MIN_BUFFER, MAX_BUFFER = 64 << 20, 512 << 20
"""Bytes that are read for the bandwidth; between them, twice the processor's last cache."""
SIDE = 1024
"""Rows and columns of the matrices."""

_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # onnx.proto's TensorProto.DataType


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a second read from memory; multiply-adds a second in fp32 and int8. None where it cannot be measured."""

    bandwidth: float | None
    fp32_peak: float | None
    int8_peak: float | None


def measure_limits(provider: Provider, threads: int, *, seconds: float) -> Limits:
    """Measure the machine's limits in about `seconds` in all."""
    each = seconds / 3
    return Limits(
        bandwidth(threads, each) if provider.device == "cpu" else None,
        _peak(fp32_product(), np.float32, provider, threads, each),
        _peak(int8_product(), np.uint8, provider, threads, each) if provider.device == "cpu" else None,
    )


def bandwidth(threads: int, seconds: float) -> float:
    """Measure bytes per second read by all threads together, each from its own part of a buffer."""
    buffer = np.ones(buffer_bytes() // 8, np.int64)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as workers:
        return buffer.nbytes / _fastest(lambda: [*workers.map(_read, parts)], seconds)


def _read(part: NDArray[np.int64]) -> int:
    return int(np.bitwise_or.reduce(part))


def buffer_bytes(cache: int | None = None) -> int:
    """Return the buffer size: twice the last-level cache, at most a quarter of the free memory."""
    wanted = 2 * (last_cache() if cache is None else cache)
    return int(min(max(wanted, MIN_BUFFER), MAX_BUFFER, psutil.virtual_memory().available // 4)) // 8 * 8


def last_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the bytes of the processor's largest cache from Linux's sysfs; elsewhere 32 MiB."""
    sizes = [32 << 20]
    for file in folder.glob("index*/size"):
        text = file.read_text("utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes[1:], default=sizes[0])


def _peak(graph: bytes, dtype: Any, provider: Provider, threads: int, seconds: float) -> float | None:
    """Measure multiply-adds per second; None where the provider has no such operator."""
    try:
        session = open_bytes(graph, provider, threads=threads)
        inputs = {"a": np.ones((SIDE, SIDE), dtype)}
        return SIDE**3 / _fastest(lambda: session.run(None, inputs, run_options(-1)), seconds)
    except onnxruntime_errors():
        return None


def _fastest(work: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest of at least three runs."""
    until, best, runs = time.perf_counter() + seconds, np.inf, 0
    while runs < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        best, runs = min(best, time.perf_counter() - begun), runs + 1
    return float(best)


def fp32_product() -> bytes:
    """Return a graph c = a b of square fp32 matrices."""
    return _product("MatMul", _FLOAT, np.float32, _FLOAT)


def int8_product() -> bytes:
    """Return the same graph in integers: a is uint8, b int8, c int32."""
    return _product("MatMulInteger", _UINT8, np.int8, _INT32)


def _product(operator: str, left: int, right: Any, result: int) -> bytes:
    """Return a product's graph; b, all ones, is an initializer, so that kernels can prepack it."""
    weights = np.ones((SIDE, SIDE), right)
    kind = {"float32": _FLOAT, "int8": _INT8}[weights.dtype.name]
    node = protobuf.encode((1, "a"), (1, "b"), (2, "c"), (4, operator))
    tensor = protobuf.encode((1, SIDE), (1, SIDE), (2, kind), (8, "b"), (9, weights.tobytes()))
    graph = protobuf.encode((1, node), (2, "product"), (5, tensor), (11, _value("a", left)), (12, _value("c", result)))
    return protobuf.encode((1, 10), (7, graph), (8, protobuf.encode((2, 21))))


def _value(name: str, kind: int) -> bytes:
    """A ValueInfoProto: a square matrix of that type."""
    dimension = protobuf.encode((1, SIDE))
    shape = protobuf.encode((1, dimension), (1, dimension))
    tensor = protobuf.encode((1, kind), (2, shape))
    return protobuf.encode((1, name), (2, protobuf.encode((1, tensor))))
