"""Observe the inputs of a graph's linears on calibration text, as ONNX Runtime computes them.

`calibration` says why torch models have statistics of their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemix.bundle import graph_io
from edgemix.runtime.graphs.providers import PROVIDERS, open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort

    from edgemix.export.graphs.weights import Matrix

_LENGTH = 256
"""Tokens read at once: the inputs of all linears of a model of 7 billion weights are then 0.8 GB."""


def observe(
    model: ir.Model, folder: Path, values: Sequence[ir.Value], windows: Sequence[Sequence[int]]
) -> Iterator[dict[ir.Value, Matrix]]:
    """Run a decoder graph on windows of text, each without a past, and yield values that it computes inside.

    Args:
        model: The fp32 graph; unchanged when the iteration ends.
        folder: The folder of its external data; a copy of the graph without weights is written there temporarily.
        values: Activations [..., K] of the graph.
        windows: Token ids; of long windows the first `_LENGTH` are read.

    Yields:
        For each window, value -> float32 [tokens, K].
    """
    graph, path = model.graph, folder / "observed.onnx"
    outputs = list(graph.outputs)
    known = {value.name for value in outputs}
    added = [value for value in values if value.name not in known]
    try:
        graph.outputs.extend(added)
        ir.save(model, path)
    finally:
        for _ in added:  # one by one: removing a slice does not update the values
            graph.outputs.pop()
    try:
        session = open_session(path, PROVIDERS["cpu"])
        names = [value.name for value in values]
        for window in windows:
            ids = np.asarray(window[:_LENGTH], np.int64)[None]
            found = session.run(names, _feed(session, ids))
            yield {value: array.reshape(-1, array.shape[-1]) for value, array in zip(values, found, strict=True)}
    finally:
        path.unlink(missing_ok=True)


def _feed(session: ort.InferenceSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    members = next(tensor.shape[2:-1] for tensor in session.get_outputs() if tensor.name == graph_io.LOGITS)
    rows, feed = math.prod(members), {}
    for tensor in session.get_inputs():
        if tensor.name == graph_io.INPUT_IDS:
            feed[tensor.name] = ids
        elif tensor.name == graph_io.ATTENTION_MASK:
            feed[tensor.name] = np.ones_like(ids)
        elif tensor.name == graph_io.TOKEN_TYPE_IDS:
            feed[tensor.name] = np.zeros_like(ids)
        elif tensor.name == graph_io.POSITION_IDS:
            feed[tensor.name] = np.arange(ids.shape[1])[None]
        else:  # an empty cache
            feed[tensor.name] = np.zeros((rows, tensor.shape[1], 0, tensor.shape[3]), np.float32)
    return feed
