"""Evaluation of a bundle on texts, in one pass: each member, their mixtures, the student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemix.bundle.manifest import STUDENT
from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, PrefixedProgress
from edgemix.results.evaluation import Evaluation, Figures, Row
from edgemix.runtime.evaluation.decode_rate import decoding_rates, generation_rate
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
"""Default for the maximum tokens of a chunk; less if the context is smaller."""


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
    """Evaluate a bundle's members, their mixtures and its student on texts, each of which is read once.

    Args:
        mixture: The loaded bundle.
        files: Name of a file or domain -> its documents; documents of less than two tokens are left out.
        student: The bundle's student, loaded alone.
        window: Maximum tokens of a chunk; see `WINDOW`.
        max_tokens: Maximum tokens of each file, from its beginning.
        speed: Measure decoding rates, too; takes some seconds.
        progress: Progress callback; counts scored tokens.

    Raises:
        InputError: A file has nothing to score.
    """
    if not files:
        raise InputError("there is no text to evaluate on")
    loaded = [mixture] if student is None else [mixture, student]
    models = tuple(model for each in loaded for model in each.ensemble(dict.fromkeys(each.members, 1.0)).graphs)
    context = min(each.context for each in loaded)
    lines = _lines(mixture, student)
    own = next(line for line in reversed(lines) if line.name == _own_name(mixture))  # not a member of that name
    ensemble = Ensemble(models, own.shares, "linear", mixture.vocabulary)
    taken = {name: scored_documents(mixture, name, documents, max_tokens) for name, documents in files.items()}
    read = {
        name: _compare(
            ensemble,
            mixture,
            documents,
            window=min(WINDOW if window is None else window, context),
            progress=PrefixedProgress(progress, name),
        )
        for name, documents in taken.items()
    }
    pooled = Comparison.of(list(read.values()))
    rows = [line.row(mixture.members, read, pooled) for line in lines]
    default = own
    if mixture.resolve_weights() == ADAPTIVE and len(mixture.members) > 1:
        default = next(line for line in lines if line.prior is not None)
    if speed:
        prompt = mixture.tokenizer.encode(next(iter(taken.values()))[0])
        timed = [index for index, line in enumerate(lines) if line.kind != "mixture" or line is own]
        ensembles = [Ensemble.of(models, lines[i].shares, "linear", mixture.vocabulary) for i in timed]
        for i, rate in zip(timed, decoding_rates(ensembles, prompt, context=context, progress=progress), strict=True):
            rows[i] = replace(rows[i], decode_rate=rate)
        prompts = [mixture.tokenizer.encode(documents[0]) for documents in taken.values()]
        as_generated = generation_rate(mixture, prompts, progress)
        place = next(i for i, line in enumerate(lines) if line is default)
        rows[place] = replace(rows[place], generation_rate=as_generated)
    return Evaluation(tuple(rows), own.name, default.name)


def score_documents(
    mixture: Mixture,
    name: str,
    documents: Sequence[str],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> NDArray[np.float64]:
    """Return every member's log-probabilities of the documents' tokens, in nats: float64 [members, tokens].

    Documents of less than two tokens are left out, and so is each document's first token.

    Args:
        mixture: The loaded bundle.
        name: The documents' name in messages.
        documents: Independent texts.
        window: Maximum tokens of a chunk; see `WINDOW`.
        max_tokens: Maximum tokens, from the beginning.
        progress: Progress callback; counts scored tokens.

    Raises:
        InputError: There is nothing to score.
    """
    taken = scored_documents(mixture, name, documents, max_tokens)
    scores = mixture.score(taken, window=min(window or WINDOW, mixture.context), progress=progress)
    return np.concatenate([score.member_log_probabilities for score in scores], axis=1)


@dataclass(frozen=True, slots=True)
class _Line:
    """What a row compares: weights float64 [models] of the members and, last, the student; with a prior, the weights
    before any text.
    """

    name: str
    kind: RowKind
    shares: NDArray[np.float64]
    prior: AdaptivePrior | None = None

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
        """Return the mixture's log-probabilities, float64 [tokens]."""
        if self.prior is None:
            return linear_targets(text.log_probabilities, self.shares)
        own = text.log_probabilities[: self.prior.components.shape[1]]
        texts = np.split(own, np.cumsum(text.lengths)[:-1], axis=1)
        return np.concatenate([adaptive_targets(each, self.prior)[0] for each in texts])

    def _figures(self, text: Comparison) -> Figures:
        nll = -float(self._targets(text).sum())
        tokens = text.log_probabilities.shape[1]
        figures = Figures(tokens, text.bytes, math.exp(nll / tokens), nll / math.log(2) / text.bytes)
        if self.kind == "mixture":
            return figures
        model = int(self.shares.argmax())
        agreement, acceptance = text.agreements[model].mean(), text.acceptances[model].mean()
        return replace(figures, agreement=float(agreement), acceptance=float(acceptance))


def _lines(mixture: Mixture, student: Mixture | None) -> list[_Line]:
    """Return the rows' contents: each member, the mixtures, the student."""
    members, fitted = mixture.members, mixture.manifest.weights
    one_hot = np.eye(len(members) + (student is not None))
    lines = [_Line(name, "member", shares) for name, shares in zip(members, one_hot, strict=False)]
    if len(members) > 1:
        choices: dict[str, Mapping[str, float]] = {"uniform": dict.fromkeys(members, 1 / len(members))}
        choices |= {_own_name(mixture): fitted.default}
        choices |= {f"fitted to {domain}": weights for domain, weights in fitted.domains.items()}
        for name, weights in choices.items():
            shares = np.zeros(len(one_hot))
            shares[: len(members)] = [weights[member] for member in members]
            lines.append(_Line(name, "mixture", shares))
        prior = AdaptivePrior.of(members, fitted.default, fitted.domains)
        shares = np.zeros(len(one_hot))
        shares[: len(members)] = prior.weights
        lines.append(_Line(ADAPTIVE, "mixture", shares, prior))
    return lines if student is None else [*lines, _Line(STUDENT, "student", one_hot[-1])]


def _own_name(mixture: Mixture) -> str:
    """Return the row name of the mixture with the bundle's own weights."""
    if len(mixture.members) == 1:
        return mixture.members[0]
    return {"uniform": "uniform", "given": "given", "fit": "fitted"}[mixture.manifest.weights.method]


def scored_documents(mixture: Mixture, name: str, documents: Sequence[str], max_tokens: int | None) -> list[str]:
    """Return the documents with at least two tokens, up to `max_tokens` tokens in all.

    Raises:
        InputError: There are none.
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
                    ensemble,
                    np.array(ids, np.int64),
                    scored_bytes=scored_bytes,
                    window=window,
                    bos=mixture.tokenizer.entry.bos,
                    advance=task.advance,
                )
                for ids, scored_bytes in encoded
            ]
        )
