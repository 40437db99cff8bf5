"""Compare a graph, as the runtime runs it, with the torch model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

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

_LENGTH = 96

_BATCH_LENGTH = 64

_STEPS = 3


def check_graph(model: PreTrainedModel, path: Path, config: GraphConfig) -> GraphParity:
    """Compare a graph with the torch model on random tokens: each sequence alone and uncached in torch, against the
    graph's prefill, its decoding of one and of several tokens after a past, and a batch of unequal lengths.

    The sequence is longer than the model's sliding windows, up to `CHECKED_WINDOW`. Where the model is unstable, so
    that no two ways to compute it agree, a difference counts in units of what a position may differ by (`NOISE_ROOM`).
    """
    windows = [window for window in sliding_windows(model.config) if window and window <= CHECKED_WINDOW]
    longest = min(config.context, max(_LENGTH, *(window + 16 for window in windows), 0))
    rows = _random_rows((longest, longest // 2, _STEPS + 2), model.config.get_text_config().vocab_size)
    expected = [_reference(model, row) for row in rows]
    member = DecoderGraph.load(path, config, name=config.exporter)
    return GraphParity(
        prefill=_worst([_difference(expected[0], member.forward(rows[:1])[0])]),
        decode=_worst(_decode_differences(member, rows[0], expected[0])),
        padded_batch=_worst(_batch_differences(member, rows, expected)),
        limit=GRAPH_TOLERANCE,
    )


def _random_rows(lengths: Sequence[int], vocabulary: int) -> list[Tokens]:
    """Token ids spread over the vocabulary, the same at every call."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length) for length in lengths]


@dataclass(frozen=True)
class _Reference:
    """What torch says to one sequence.

    Attributes:
        logits: float32 [tokens, vocabulary].
        units: float64 [tokens], how many times `GRAPH_TOLERANCE` each position may differ, at least 1.
    """

    logits: torch.Tensor
    units: torch.Tensor

    def __getitem__(self, part: slice) -> _Reference:
        return _Reference(self.logits[part], self.units[part])


def _reference(model: PreTrainedModel, row: Tokens) -> _Reference:
    """The torch model's word on one sequence, read whole and without a cache."""
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


def _decode_differences(member: DecoderGraph, row: Tokens, expected: _Reference) -> Iterator[float]:
    """One token after a past, then the rest of the row, several at once."""
    cache = member.new_cache()
    past = len(row) - _LENGTH // 8
    member.extend(cache, row[None, :past])
    for start, end in ((past, past + 1), (past + 1, len(row))):
        yield _difference(expected[start:end], member.extend_all(cache, row[None, start:end])[0])


def _batch_differences(member: DecoderGraph, rows: list[Tokens], expected: list[_Reference]) -> Iterator[float]:
    """Rows of unequal length: in one call, padded on the right; and from a cache, token by token."""
    beginnings = [row[:_BATCH_LENGTH] for row in rows]
    for logits, wanted in zip(member.forward(beginnings), expected, strict=True):
        yield _difference(wanted[: len(logits)], logits)
    cache = member.new_cache(len(rows))
    member.extend(cache, [row[:-_STEPS] for row in rows])
    for step in range(-_STEPS, 0):
        logits = member.extend(cache, [row[step, None] for row in rows])
        for row_logits, wanted in zip(logits, expected, strict=True):
            yield _difference(wanted[step : step + 1 or None], row_logits[None])


def _difference(expected: _Reference, logits: NDArray[np.float32]) -> float:
    """Largest difference of log-probabilities in its position's unit, NaN if there is one."""
    return float((_differences(expected.logits, torch.from_numpy(logits)) / expected.units).max())


def _differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest difference of log-probabilities at each position: float64 [tokens], a NaN stays one."""
    pairs = zip(a.split(_LENGTH), b.split(_LENGTH), strict=True)
    return torch.cat([(_log_probabilities(x) - _log_probabilities(y)).abs().amax(-1) for x, y in pairs])


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _worst(differences: Iterable[float]) -> float:
    """The largest; unlike Python's max, a NaN anywhere is the result."""
    return float(np.max(list(differences)))
