"""How well a bundle predicts texts, all in one pass: each member, their mixtures, the student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemix.bundle.manifest import STUDENT
from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, PrefixedProgress
from edgemix.results.evaluation import Evaluation, Figures, Row
from edgemix.runtime.evaluation.decode_rate import decoding_rates
from edgemix.runtime.evaluation.draft_agreement import Comparison, compare_tokens
from edgemix.runtime.mixing.adaptive import AdaptivePrior, adaptive_targets
from edgemix.runtime.mixing.arithmetic import linear_targets
from edgemix.runtime.mixing.ensemble import ADAPTIVE, Ensemble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.progress import Progress
    from edgemix.results.evaluation import RowKind
    from edgemix.runtime.mixture import Mixture

WINDOW = 512
"""Tokens that are read with one past, unless told otherwise or the context is smaller."""


def evaluate(
    mixture: Mixture,
    files: Mapping[str, Sequence[str]],
    *,
    student: Mixture | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    speed: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Evaluation:
    """Measure a bundle's members, their mixtures and its student on texts, each of which is read once.

    Args:
        mixture: The bundle, loaded.
        files: Name of a file or domain -> its documents; documents of less than two tokens have nothing to score.
        student: The bundle's student, loaded.
        window: Most tokens that are read with one past; see `WINDOW`.
        max_tokens: Read so many tokens of each file at most, from its beginning.
        speed: Measure, too, how fast members, mixture and student decode; takes some seconds.
        progress: Hears of the tokens scored.

    Raises:
        InputError: A file has nothing to score.
    """
    if not files:
        raise InputError("there is no text to evaluate on")
    opened = [mixture] if student is None else [mixture, student]
    models = tuple(model for each in opened for model in each.ensemble(dict.fromkeys(each.members, 1.0)).graphs)
    context = min(each.context for each in opened)
    lines = _lines(mixture, student)
    own = next(line for line in reversed(lines) if line.name == _own_name(mixture))  # not a member of that name
    ensemble = Ensemble(models, own.shares, "linear", mixture.vocabulary)
    taken = {name: scored_documents(mixture, name, documents, max_tokens) for name, documents in files.items()}
    read = {
        name: _compare(
            ensemble,
            mixture,
            documents,
            window=min(window or WINDOW, context),
            progress=PrefixedProgress(progress, name),
        )
        for name, documents in taken.items()
    }
    pooled = Comparison.of(list(read.values()))
    rows = [line.row(mixture.members, read, pooled) for line in lines]
    if speed:
        prompt = mixture.tokenizer.encode(next(iter(taken.values()))[0])
        timed = [index for index, line in enumerate(lines) if line.kind != "mixture" or line is own]
        ensembles = [Ensemble.of(models, lines[i].shares, "linear", mixture.vocabulary) for i in timed]
        for i, rate in zip(timed, decoding_rates(ensembles, prompt, context=context, progress=progress), strict=True):
            rows[i] = replace(rows[i], decode_rate=rate)
    return Evaluation(tuple(rows), own.name)


def score_documents(
    mixture: Mixture,
    name: str,
    documents: Sequence[str],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> NDArray[np.float64]:
    """Every member's log-probabilities of the documents' tokens, in nats: float64 [members, tokens].

    Documents of less than two tokens are left out, and so is each document's first token.

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
    taken = scored_documents(mixture, name, documents, max_tokens)
    scores = mixture.score(taken, window=min(window or WINDOW, mixture.context), progress=progress)
    return np.concatenate([score.member_log_probabilities for score in scores], axis=1)


@dataclass(frozen=True, slots=True)
class _Line:
    """A row to be, by its shares float64 [models] of the members and the student after them; with experts, those are
    only the shares before any text.
    """

    name: str
    kind: RowKind
    shares: NDArray[np.float64]
    experts: AdaptivePrior | None = None

    def row(self, members: Sequence[str], files: Mapping[str, Comparison], pooled: Comparison) -> Row:
        weights = {} if self.kind == "student" else dict(zip(members, self.shares.tolist(), strict=False))
        return Row(
            self.name,
            weights,
            {name: self._figures(text) for name, text in files.items()},
            self._figures(pooled),
            self.kind,
        )

    def _targets(self, text: Comparison) -> NDArray[np.float64]:
        """The mixture's log-probabilities, float64 [tokens]."""
        if self.experts is None:
            return linear_targets(text.log_probabilities, self.shares)
        own = text.log_probabilities[: self.experts.components.shape[1]]
        texts = np.split(own, np.cumsum(text.lengths)[:-1], axis=1)
        return np.concatenate([adaptive_targets(each, self.experts)[0] for each in texts])

    def _figures(self, text: Comparison) -> Figures:
        surprise = -float(self._targets(text).sum())
        tokens = text.log_probabilities.shape[1]
        figures = Figures(tokens, text.bytes, math.exp(surprise / tokens), surprise / math.log(2) / text.bytes)
        if self.kind == "mixture":
            return figures
        model = int(self.shares.argmax())
        agreement, acceptance = text.agreements[model].mean(), text.acceptances[model].mean()
        return replace(figures, agreement=float(agreement), acceptance=float(acceptance))


def _lines(mixture: Mixture, student: Mixture | None) -> list[_Line]:
    """What the table compares: each member, the ways to weigh them, the student."""
    members, fitted = mixture.members, mixture.manifest.weights
    one_hot = np.eye(len(members) + (student is not None))
    lines = [_Line(name, "member", shares) for name, shares in zip(members, one_hot, strict=False)]
    if len(members) > 1:
        ways: dict[str, Mapping[str, float]] = {"uniform": dict.fromkeys(members, 1 / len(members))}
        ways |= {_own_name(mixture): fitted.default}
        ways |= {f"fitted to {domain}": weights for domain, weights in fitted.domains.items()}
        for name, weights in ways.items():
            shares = np.zeros(len(one_hot))
            shares[: len(members)] = [weights[member] for member in members]
            lines.append(_Line(name, "mixture", shares))
        experts = AdaptivePrior.of(members, fitted.default, fitted.domains)
        shares = np.zeros(len(one_hot))
        shares[: len(members)] = experts.weights
        lines.append(_Line(ADAPTIVE, "mixture", shares, experts))
    return lines if student is None else [*lines, _Line(STUDENT, "student", one_hot[-1])]


def _own_name(mixture: Mixture) -> str:
    """What the table calls the mixture with the bundle's own weights."""
    if len(mixture.members) == 1:
        return mixture.members[0]
    return {"uniform": "uniform", "given": "given", "fit": "fitted"}[mixture.manifest.weights.method]


def scored_documents(mixture: Mixture, name: str, documents: Sequence[str], max_tokens: int | None) -> list[str]:
    """The documents that there is something to score in, up to so many tokens.

    Raises:
        InputError: There is none.
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
    return taken


def _compare(
    ensemble: Ensemble, mixture: Mixture, documents: Sequence[str], *, window: int, progress: Progress
) -> Comparison:
    encoded = [mixture.tokenizer.encode_for_scoring(document) for document in documents]
    with progress.stage("scoring", sum(len(ids) - 1 for ids, _ in encoded)) as task:
        return Comparison.of(
            [
                compare_tokens(
                    ensemble, np.array(ids, np.int64), scored_bytes=scored_bytes, window=window, advance=task.advance
                )
                for ids, scored_bytes in encoded
            ]
        )
