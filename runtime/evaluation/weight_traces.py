"""Adaptive weights along texts: which member has the most weight where."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.progress import NO_PROGRESS
from edgemix.results.evaluation import WeightTrace
from edgemix.runtime.evaluation.scoring import score_tokens
from edgemix.runtime.mixing.adaptive import adaptive_targets
from edgemix.runtime.mixing.ensemble import ADAPTIVE
from edgemix.runtime.text.detokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemix.progress import Progress
    from edgemix.runtime.mixture import Mixture

STREAM = "stream"
"""Name of the trace that alternates between the texts."""
TURNS = 2
"""Number of parts of each text in the stream."""
_MAX_TOKEN_LENGTH = 64
"""Upper bound of a token's characters, which limits the text that is encoded."""


def trace_weights(
    mixture: Mixture,
    texts: Mapping[str, Sequence[str]],
    *,
    tokens: int = 256,
    window: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> tuple[WeightTrace, ...]:
    """Return the members' adaptive weights along the beginnings of texts; empty for a bundle of one member.

    With several texts, the first trace is a stream that alternates between them.

    Args:
        mixture: The loaded bundle.
        texts: Name -> documents.
        tokens: Tokens of each text.
        window: Maximum tokens of a chunk; the context by default.
        progress: Progress callback.

    Raises:
        EdgemixError: A graph fails.
    """
    if len(mixture.members) == 1:
        return ()
    heads = [(name, head) for name, documents in texts.items() if len(head := _head(mixture, documents, tokens)) > 1]
    sequences = [_TokenSequence(name, head) for name, head in heads]
    if len(sequences) > 1:
        sequences.insert(0, _alternate(mixture, sequences, -(-tokens // TURNS)))
    with progress.stage("weight traces", sum(len(each.ids) for each in sequences)) as task:
        return tuple(
            _trace(mixture, each, mixture.context if window is None else window, task.advance) for each in sequences
        )


class _TokenSequence(NamedTuple):
    """Token ids without a beginning-of-text token; name and origins as in `WeightTrace`."""

    name: str
    ids: list[int]
    origins: tuple[tuple[int, str], ...] = ()


def _head(mixture: Mixture, documents: Sequence[str], tokens: int) -> list[int]:
    """Return the first tokens of a text's documents, with empty lines between them."""
    ids: list[int] = []
    for document in documents:
        if len(ids) >= tokens:
            break
        text = f"\n\n{document}" if ids else document
        if text:
            ids += mixture.tokenizer.encode(text[: tokens * _MAX_TOKEN_LENGTH], bos=False)
    return ids[:tokens]


def _alternate(mixture: Mixture, texts: Sequence[_TokenSequence], part: int) -> _TokenSequence:
    """Alternate between the texts in parts of `part` tokens, with empty lines between them."""
    between = mixture.tokenizer.encode("\n\n", bos=False)
    ids: list[int] = []
    origins: list[tuple[int, str]] = []
    for start in range(0, max(len(text.ids) for text in texts), part):
        for text in texts:
            if piece := text.ids[start : start + part]:
                origins.append((len(ids), text.name))
                ids += [*piece, *between]
    return _TokenSequence(STREAM, ids, tuple(origins))


def _trace(mixture: Mixture, sequence: _TokenSequence, window: int, advance: Callable[[float], None]) -> WeightTrace:
    """Compute the adaptive weights along a text."""
    bos = mixture.tokenizer.entry.bos
    ids = sequence.ids if bos is None else [bos, *sequence.ids]
    ensemble = mixture.full_ensemble(ADAPTIVE)
    if ensemble.prior is None:
        raise ValueError("an adaptive ensemble must have a prior")
    _, own = score_tokens(
        ensemble.graphs,
        ensemble.weights,
        np.array(ids, np.int64),
        combine=ensemble.combine,
        vocabulary=ensemble.vocabulary,
        window=window,
        bos=bos,
        advance=advance,
    )
    _, path = adaptive_targets(own, ensemble.prior)
    along = np.concatenate([ensemble.weights[:, None], path], axis=1)[:, -len(sequence.ids) :]
    decoder = IncrementalDecoder(mixture.tokenizer, ids[: -len(sequence.ids)])
    pieces = [decoder.add(token) for token in sequence.ids]
    pieces[-1] += decoder.rest()
    return WeightTrace(
        sequence.name,
        tuple(pieces),
        {name: tuple(weights.tolist()) for name, weights in zip(mixture.members, along, strict=True)},
        sequence.origins,
    )
