"""CUDA graphs: calls of one shape that a GPU records once and then replays as a whole, kernel launches included.

A recording holds addresses and shapes. So inputs and logits have memory of their own that stays in place, the mask is
as wide as the cache, and a call whose cache has moved needs another recording. ONNX Runtime keeps recordings by number
as long as the session lives: -1 records nothing, and 0 is reserved. The first call of a number runs several times; that
changes nothing, as the cache's positions are written again each time.
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
"""Most recordings of a session; further calls run without, or their memory would grow with every text."""


def numbers() -> Iterator[int]:
    """Return the numbers of a session's recordings."""
    return iter(range(1, MOST + 1))


class CudaGraph:
    """The recorded call of one shape on one cache.

    Args:
        binding: ONNX Runtime's binding; inputs and logits are bound here, the cache elsewhere.
        provider: A provider that records.
        shapes: Shapes of the int64 inputs, by name.
        logits: An array with the shape and dtype of the logits.
        number: Number of the recording.

    Attributes:
        options: The call's run options.
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
        """Write an input's values [rows, columns], followed by zeros."""
        host = self._hosts[name]
        host[:, : values.shape[1]] = values
        host[:, values.shape[1] :] = 0
        self._inputs[name].update_inplace(host)

    def read(self, logits: NDArray[Any]) -> None:
        """Copy the logits of the last call."""
        np.copyto(logits, self._logits.numpy())
