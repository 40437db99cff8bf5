"""Which member speaks where in a text: adaptive weights along passages, for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.progress import NO_PROGRESS
from edgemix.results.evaluation import Passage
from edgemix.runtime.evaluation.scoring import score_tokens
from edgemix.runtime.mixing.adaptive import adaptive_targets
from edgemix.runtime.options import ADAPTIVE
from edgemix.runtime.text.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemix.progress import Progress
    from edgemix.runtime.mixture import Mixture

STREAM = "stream"
"""What the passage is called that alternates between the texts."""
TURNS = 2
"""How often each text comes up in the stream."""
_WIDEST = 64
"""More characters than a token has: so many, times the tokens wanted, are enough text to encode."""


def follow_texts(
    mixture: Mixture,
    texts: Mapping[str, Sequence[str]],
    *,
    tokens: int = 256,
    window: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> tuple[Passage, ...]:
    """The members' adaptive weights along the beginnings of texts; nothing of a bundle of one member.

    Args:
        mixture: The bundle, loaded.
        texts: Name -> documents.
        tokens: Of each text. Where there are several, a stream comes first that has them in turn, a part at a time.
        window: Most tokens that are read with one past; the context by default.
        progress: Hears of the tokens scored.

    Raises:
        EdgemixError: A graph fails.
    """
    if len(mixture.members) == 1:
        return ()
    found = [(name, head) for name, documents in texts.items() if len(head := _head(mixture, documents, tokens)) > 1]
    read = [_Reading(name, head) for name, head in found]
    if len(read) > 1:
        read.insert(0, _in_turns(mixture, read, -(-tokens // TURNS)))
    with progress.stage("who speaks where", sum(len(each.ids) for each in read)) as task:
        return tuple(_follow(mixture, each, window or mixture.context, task.advance) for each in read)


class _Reading(NamedTuple):
    """Token ids to read, without a beginning-of-text token; see `Passage` for the others."""

    name: str
    ids: list[int]
    origins: tuple[tuple[int, str], ...] = ()


def _head(mixture: Mixture, documents: Sequence[str], tokens: int) -> list[int]:
    """The first tokens of a text's documents, an empty line between two of them."""
    ids: list[int] = []
    for document in documents:
        if len(ids) >= tokens:
            break
        text = f"\n\n{document}" if ids else document
        if text:
            ids += mixture.tokenizer.encode(text[: tokens * _WIDEST], bos=False)
    return ids[:tokens]


def _in_turns(mixture: Mixture, texts: Sequence[_Reading], part: int) -> _Reading:
    """Parts of so many tokens of each text in turn, an empty line between two of them."""
    between = mixture.tokenizer.encode("\n\n", bos=False)
    ids: list[int] = []
    origins: list[tuple[int, str]] = []
    for start in range(0, max(len(text.ids) for text in texts), part):
        for text in texts:
            if piece := text.ids[start : start + part]:
                origins.append((len(ids), text.name))
                ids += [*piece, *between]
    return _Reading(STREAM, ids, tuple(origins))


def _follow(mixture: Mixture, reading: _Reading, window: int, advance: Callable[[float], None]) -> Passage:
    """Read a text, and find the weights along it."""
    bos = mixture.tokenizer.entry.bos
    ids = reading.ids if bos is None else [bos, *reading.ids]
    ensemble = mixture.full_ensemble(ADAPTIVE)
    if ensemble.prior is None:
        raise ValueError("adaptive weights come with experts")
    _, own = score_tokens(
        ensemble.graphs,
        ensemble.weights,
        np.array(ids, np.int64),
        combine=ensemble.combine,
        vocabulary=ensemble.vocabulary,
        window=min(window, mixture.context),
        advance=advance,
    )
    _, path = adaptive_targets(own, ensemble.prior)
    along = np.concatenate([ensemble.weights[:, None], path], axis=1)[:, -len(reading.ids) :]
    decoder = IncrementalDecoder(mixture.tokenizer, ids[: -len(reading.ids)])
    return Passage(
        reading.name,
        tuple(decoder.add(token) for token in reading.ids),
        {name: tuple(weights.tolist()) for name, weights in zip(mixture.members, along, strict=True)},
        reading.origins,
    )
