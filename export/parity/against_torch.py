"""Compare a graph, as the runtime runs it, with the torch model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemix.bundle.graph_safety import verify_graph
from edgemix.bundle.manifest import GraphParity
from edgemix.export.models.architecture import sliding_windows
from edgemix.export.parity.limits import CHECKED_WINDOW, GRAPH_TOLERANCE, NOISE, NOISE_ROOM
from edgemix.runtime.graphs.decoder import DecoderGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from edgemix.bundle.graph_io import GraphConfig

    Tokens = NDArray[np.int64]

_LENGTH, _BATCH_LENGTH, _STEPS = 96, 64, 3
"""Tokens of the sequence and of the rows of a batch, and tokens decoded one a call."""


def check_graph(model: PreTrainedModel, path: Path, config: GraphConfig) -> GraphParity:
    """Compare a graph with the torch model on random tokens.

    Each sequence, read alone and without a cache in torch, is compared with the graph's prefill, its decoding of one
    and of several tokens after a past, and a batch of unequal lengths.

    The sequence is longer than the model's sliding windows, up to `CHECKED_WINDOW`. Where the model is unstable, so
    that no two ways to compute it agree, a difference counts in units of what a position may differ by (`NOISE_ROOM`).
    """
    windows = [window for window in sliding_windows(model.config) if window and window <= CHECKED_WINDOW]
    longest = min(config.context, max(_LENGTH, *(window + 16 for window in windows), 0))
    rows = _random_rows((longest, longest // 2, _STEPS + 2), model.config.get_text_config().vocab_size)
    expected = [_reference(model, row) for row in rows]
    verify_graph(path)  # what a bundle may not hold is not exported
    graph = DecoderGraph.load(path, config, name=config.exporter)
    return GraphParity(
        prefill=_worst([_difference(expected[0], graph.forward(rows[:1])[0])]),
        decode=_worst(_decode_differences(graph, rows[0], expected[0])),
        padded_batch=_worst(_batch_differences(graph, rows, expected)),
        limit=GRAPH_TOLERANCE,
    )


def _random_rows(lengths: Sequence[int], vocabulary: int) -> list[Tokens]:
    """Return random token ids over the vocabulary, the same at every call."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length) for length in lengths]


@dataclass(frozen=True)
class _Reference:
    """The torch model's logits for one sequence.

    Attributes:
        logits: float32 [tokens, vocabulary].
        units: float64 [tokens], each position's tolerance in units of `GRAPH_TOLERANCE`, at least 1.
    """

    logits: torch.Tensor
    units: torch.Tensor

    def __getitem__(self, part: slice) -> _Reference:
        return _Reference(self.logits[part], self.units[part])


def _reference(model: PreTrainedModel, row: Tokens) -> _Reference:
    """Compute the torch model's logits for one sequence, without a cache."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator))

    logits = _logits(model, row)
    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        noise = torch.stack([_differences(logits, _logits(model, row)) for _ in range(2)]).amax(0)
    finally:
        handle.remove()
    return _Reference(logits, (noise * NOISE_ROOM / GRAPH_TOLERANCE).clamp(min=1))


def _logits(model: PreTrainedModel, row: Tokens) -> torch.Tensor:
    ids = torch.from_numpy(row)[None]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0]


def _decode_differences(graph: DecoderGraph, row: Tokens, expected: _Reference) -> Iterator[float]:
    """Yield differences of one token after a past, then of the rest of the row in one call."""
    cache = graph.new_cache()
    past = len(row) - _LENGTH // 8
    graph.extend(cache, row[None, :past])
    for start, end in ((past, past + 1), (past + 1, len(row))):
        yield _difference(expected[start:end], graph.extend_all(cache, row[None, start:end])[0])


def _batch_differences(graph: DecoderGraph, rows: list[Tokens], expected: list[_Reference]) -> Iterator[float]:
    """Yield differences of rows of unequal length: in one right-padded call, and token by token from a cache."""
    beginnings = [row[:_BATCH_LENGTH] for row in rows]
    for logits, wanted in zip(graph.forward(beginnings), expected, strict=True):
        yield _difference(wanted[: len(logits)], logits)
    cache = graph.new_cache(len(rows))
    graph.extend(cache, [row[:-_STEPS] for row in rows])
    for step in range(-_STEPS, 0):
        logits = graph.extend(cache, [row[step, None] for row in rows])
        for row_logits, wanted in zip(logits, expected, strict=True):
            yield _difference(wanted[step : step + 1 or None], row_logits[None])


def _difference(expected: _Reference, logits: NDArray[np.float32]) -> float:
    """Return the largest difference of log-probabilities in its position's unit, or NaN if there is one."""
    return float((_differences(expected.logits, torch.from_numpy(logits)) / expected.units).max())


def _differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the largest difference of log-probabilities at each position, float64 [tokens]; NaN is kept."""
    pairs = zip(a.split(_LENGTH), b.split(_LENGTH), strict=True)
    return torch.cat([(_log_probabilities(x) - _log_probabilities(y)).abs().amax(-1) for x, y in pairs])


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _worst(differences: Iterable[float]) -> float:
    """Return the largest difference, or NaN if there is one, unlike Python's max."""
    return float(np.max(list(differences)))
