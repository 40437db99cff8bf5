"""How well a bundle predicts texts: each member, the uniform mixture, the fitted ones, all in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import SILENT, Prefixed
from edgemix.runtime.mixing import linear_targets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.progress import Progress
    from edgemix.runtime.mixture import Mixture

WINDOW = 512
"""Tokens that are read with one past, unless told otherwise or the context is smaller."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How probable some text is.

    Attributes:
        tokens: Number of scored tokens: all but each document's first.
        bytes: Their UTF-8 bytes.
        perplexity: Exp of the mean negative log-probability of a token.
        bits_per_byte: Negative log2-probability of the tokens by their bytes: comparable between tokenizers.
    """

    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way to weigh the members.

    Attributes:
        name: A member's name, "uniform", "fitted" or "given" (the bundle's own weights), "fitted to DOMAIN".
        weights: Member name -> share, summing to one.
        files: File name -> figures.
        overall: Over the tokens of all files.
    """

    name: str
    weights: dict[str, float]
    files: dict[str, Figures]
    overall: Figures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The table that `evaluate` makes: a row for each member, then one for each mixture of them."""

    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The first row of that name; members come first.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Scored:
    """Texts as every member sees them: log-probabilities [members, tokens] in nats, and their bytes."""

    log_probabilities: NDArray[np.float64]
    bytes: int

    def figures(self, weights: NDArray[np.float64]) -> Figures:
        total = -float(linear_targets(self.log_probabilities, weights).sum())
        tokens = self.log_probabilities.shape[1]
        return Figures(tokens, self.bytes, math.exp(total / tokens), total / math.log(2) / self.bytes)


def evaluate(
    mixture: Mixture,
    files: Mapping[str, Sequence[str]],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure a bundle's members and their mixtures on texts. Each text is read once, whatever the number of rows.

    Args:
        mixture: The bundle, loaded.
        files: Name of a file or domain -> its documents; documents of less than two tokens have nothing to score.
        window: Most tokens that are read with one past; see `WINDOW`.
        max_tokens: Read so many tokens of each file at most, from its beginning.
        progress: Hears of the tokens scored.

    Raises:
        InputError: A file has nothing to score.
    """
    scored = {
        name: score_documents(
            mixture, name, documents, window=window, max_tokens=max_tokens, progress=Prefixed(progress, name)
        )
        for name, documents in files.items()
    }
    if not scored:
        raise InputError("there is no text to evaluate on")
    pooled = Scored(
        np.concatenate([each.log_probabilities for each in scored.values()], axis=1),
        sum(each.bytes for each in scored.values()),
    )

    def row(name: str, weights: Mapping[str, float]) -> Row:
        shares = np.array([weights.get(member, 0.0) for member in mixture.members])
        return Row(
            name,
            dict(zip(mixture.members, shares.tolist(), strict=True)),
            {file: each.figures(shares) for file, each in scored.items()},
            pooled.figures(shares),
        )

    return Evaluation(tuple(row(name, weights) for name, weights in _ways(mixture)))


def score_documents(
    mixture: Mixture,
    name: str,
    documents: Sequence[str],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Scored:
    """Every member's log-probabilities of the documents' tokens; documents of less than two tokens are left out.

    Args:
        mixture: The bundle, loaded.
        name: What the documents are called in a message.
        documents: Texts that share nothing.
        window: Most tokens that are read with one past; see `WINDOW`.
        max_tokens: Read so many tokens at most, from the beginning.
        progress: Hears of the tokens scored.

    Raises:
        InputError: There is nothing to score.
    """
    taken, left = [], max_tokens
    for document in documents:
        ids = mixture.tokenizer.encode(document) if document else []
        text = document
        if left is not None and len(ids) > left:
            text, ids = mixture.tokenizer.shorten(document, left), ids[:left]
        if len(ids) > 1:
            taken.append(text)
        if left is not None:
            left -= len(ids)
            if left < 2:
                break
    if not taken:
        raise InputError(f"{name}: no tokens to score", "Give text of at least two tokens.")
    window = min(WINDOW, mixture.context) if window is None else min(window, mixture.context)
    scores = mixture.score(taken, window=window, progress=progress)
    return Scored(
        np.concatenate([score.member_log_probabilities for score in scores], axis=1),
        sum(score.scored_bytes for score in scores),
    )


def _ways(mixture: Mixture) -> list[tuple[str, Mapping[str, float]]]:
    """The ways to weigh the members that a table compares, by name."""
    ways: list[tuple[str, Mapping[str, float]]] = [(member, {member: 1.0}) for member in mixture.members]
    if len(mixture.members) == 1:
        return ways
    ways.append(("uniform", dict.fromkeys(mixture.members, 1 / len(mixture.members))))
    fitted = mixture.manifest.weights
    if fitted.method != "uniform":
        ways.append(("fitted" if fitted.method == "fit" else "given", fitted.default))
    ways += [(f"fitted to {domain}", weights) for domain, weights in fitted.domains.items()]
    return ways
