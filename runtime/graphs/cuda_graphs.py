"""Calls of one shape that a GPU records once and then replays as a whole (CUDA graphs), kernel launches and all.

What is recorded are addresses and shapes, so inputs and logits have memory of their own that stays, the mask is as wide
as the cache, and a call whose cache has moved is another one. ONNX Runtime keeps recordings by a number, as long as the
session lives: -1 records nothing, and 0 is its own. The first call of a number runs several times; that changes
nothing, as the cache's places are written anew each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.bundle import graph_io
from edgemix.runtime.graphs.providers import place, run_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.providers import Provider

MOST = 64
"""Recordings of a session; calls beyond them run as they are, or the memory for them would grow with every text."""


def numbers() -> Iterator[int]:
    """Of a session's recordings."""
    return iter(range(1, MOST + 1))


class CudaGraph:
    """Calls of one shape on one cache.

    Args:
        binding: What ONNX Runtime reads and writes; inputs and logits are bound here, the cache by itself.
        provider: A row that captures.
        shapes: Of the int64 inputs, by name.
        logits: An array like the logits.
        number: Of the recording.

    Attributes:
        options: How the calls run.
    """

    def __init__(
        self,
        binding: Any,
        provider: Provider,
        shapes: Mapping[str, tuple[int, ...]],
        logits: NDArray[Any],
        number: int,
    ) -> None:
        self._hosts = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        self._inputs = {name: place(host.copy(), provider) for name, host in self._hosts.items()}
        self._logits = place(np.zeros_like(logits), provider)
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(graph_io.LOGITS, self._logits)
        self.options = run_options(number)

    def write(self, name: str, values: NDArray[np.int64]) -> None:
        """Let an input have these values [rows, columns], and zeros behind them."""
        host = self._hosts[name]
        host[:, : values.shape[1]] = values
        host[:, values.shape[1] :] = 0
        self._inputs[name].update_inplace(host)

    def read(self, logits: NDArray[Any]) -> None:
        """Copy the logits of the last call."""
        np.copyto(logits, self._logits.numpy())
