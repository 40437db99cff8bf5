"""`TokenClassifier`: a mixture whose y is a label for each word of a text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.cancellation import in_thread
from edgemix.runtime.classification.encoding import joined
from edgemix.runtime.classification.loaded import LabelMixture
from edgemix.runtime.classification.members import EncoderModel, RulesModel, Scores
from edgemix.runtime.classification.tokens.bio import LabelScheme, viterbi
from edgemix.runtime.classification.tokens.spans import Aggregation, Entity, aggregate, entities, merge_windows
from edgemix.runtime.classification.tokens.words import Pooling, given_words, on_words, text_words
from edgemix.runtime.mixing.arithmetic import log_softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import Text
    from edgemix.runtime.classification.loaded import LabelWeights
    from edgemix.tasks import LabelCombine, LabelTaskName

Decoding = Literal["consistent"] | Aggregation
"""How labels of words become entities: by the most probable consistent sequence (an I-X follows a B-X or an I-X), or as
transformers' pipeline aggregates them, with words as units."""
CHUNK = 256
"""Texts that are read at once."""
LONGEST_TEXT = 1 << 20
"""Most characters of a text, or words: every one of them is read."""
_SHARED = 8
"""A window of a long text shares one of so many tokens with each neighbor."""


@dataclass(frozen=True, slots=True)
class TokenPrediction:
    """The answer for one text.

    Attributes:
        entities: Its entities, in order.
        words: First character of each word, and the one after its last.
        labels: The label of each word.
        probabilities: Probability of each word's label.
    """

    entities: tuple[Entity, ...]
    words: tuple[tuple[int, int], ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


class TokenClassifier(LabelMixture):
    """A loaded mixture of taggers, which may have different tokenizers: their distributions mix on words.

    with TokenClassifier.load("bundle") as tagger:
        print(tagger.predict("Ada lived in London").entities)
    """

    task: ClassVar[LabelTaskName] = "token-classification"

    def predict(
        self,
        text: Text,
        *,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
        aggregation: Decoding = "consistent",
    ) -> TokenPrediction:
        """Label the words of a text; see `predict_batch`."""
        return self.predict_batch([text], weights=weights, combine=combine, aggregation=aggregation)[0]

    def predict_batch(
        self,
        texts: Sequence[Text],
        *,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
        aggregation: Decoding = "consistent",
        progress: Progress = NO_PROGRESS,
    ) -> list[TokenPrediction]:
        """Label the words of texts.

        Long texts are read in windows that share tokens with their neighbors. A member that has no token of a word
        abstains on it.

        Args:
            texts: Texts, whose words are runs of letters and single signs; or lists of words.
            weights: See `LabelWeights`.
            combine: How the members' distributions are mixed; as the bundle says by default.
            aggregation: See `Decoding`. Of "first", "average" and "max", a word's distribution is made so of its
                tokens'; the others take the first token's.
            progress: Progress callback, in texts.

        Raises:
            InputError: A text is none, or an option is out of its bounds.
            EdgemixError: A graph fails.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts", "Use predict for one text.")
        choices = ("consistent", *get_args(Aggregation))
        if aggregation not in choices:
            raise InputError(f"aggregation={aggregation!r} is unknown", f"Choose one of: {', '.join(choices)}.")
        pooling: Pooling = aggregation if aggregation in get_args(Pooling) else "first"  # type: ignore[assignment]
        shares, how = self.shares(weights), self.combine_option(combine)
        found: list[TokenPrediction] = []
        with progress.stage("predict", len(texts)) as task:
            for first in range(0, len(texts), CHUNK):
                chunk = texts[first : first + CHUNK]
                words = [_words(text) for text in chunk]
                mixed = self.mixed(self._scores(chunk, words, shares, pooling), shares, how)
                start = 0
                for text, places in zip(chunk, words, strict=True):
                    found.append(self._prediction(text, places, mixed[start : start + len(places)], aggregation))
                    start += len(places)
                task.advance(len(chunk))
        return found

    async def apredict(self, text: Text, **options: object) -> TokenPrediction:
        """As `predict`, for asyncio: the work is done in a thread, and cancelled with the task."""
        return await in_thread(lambda: self.predict(text, **options))  # type: ignore[arg-type]

    async def apredict_batch(self, texts: Sequence[Text], **options: object) -> list[TokenPrediction]:
        """As `predict_batch`, for asyncio."""
        return await in_thread(lambda: self.predict_batch(texts, **options))  # type: ignore[arg-type]

    def score_texts(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> tuple[list[Scores], list[int]]:
        if pairs is not None:
            raise InputError("token-classification reads no pairs of texts")
        words = [_words(text) for text in texts]
        return self._scores(texts, words, np.ones(len(self.members)), "first"), [len(each) for each in words]

    def consistent(self, mixed: NDArray[np.float64], lengths: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the most probable consistent labels of each text's words, from `mixed` [all texts' words, labels]."""
        labels = viterbi(mixed.astype(np.float32), LabelScheme(self.labels), lengths)
        cuts = np.cumsum([0, *lengths])
        return [tuple(self.labels[each] for each in labels[low:high]) for low, high in pairwise(cuts)]

    def _prediction(
        self, text: Text, words: NDArray[np.int64], mixed: NDArray[np.float64], aggregation: Decoding
    ) -> TokenPrediction:
        logs, scheme, whole = mixed.astype(np.float32), LabelScheme(self.labels), joined(text)
        if aggregation == "consistent":
            labels = viterbi(logs, scheme)
            found = entities(whole, labels, logs, words, scheme)
        else:
            labels = logs.argmax(axis=-1)
            grouped: Aggregation = "none" if aggregation == "none" else "simple"
            found = aggregate(whole, logs, words, scheme, aggregation=grouped)
        return TokenPrediction(
            found,
            tuple((int(start), int(end)) for start, end in words),
            tuple(self.labels[label] for label in labels),
            tuple(np.exp(mixed[np.arange(len(labels)), labels]).tolist()),
        )

    def _scores(
        self, texts: Sequence[Text], words: Sequence[NDArray[np.int64]], shares: NDArray[np.float64], pooling: Pooling
    ) -> list[Scores]:
        """Return the scores of all texts' words by each member, one text after another; of weight zero without any."""
        total = sum(map(len, words))
        found = []
        for model, share in zip(self.models, shares, strict=True):
            if share == 0 or not total:
                empty = np.zeros((total, len(model.labels)), np.float32)
                found.append(Scores(empty, np.zeros(total, np.bool_)))
            elif isinstance(model, EncoderModel):
                found.append(_encoder_scores(model, texts, words, pooling))
            elif isinstance(model, RulesModel):
                found.append(_rule_scores(model, texts, words))
        return found


def _words(text: Text) -> NDArray[np.int64]:
    if isinstance(text, str | list | tuple) and len(text) > LONGEST_TEXT:
        raise InputError(
            f"a text has {len(text):,} characters or words; at most {LONGEST_TEXT:,} are labeled at once", "Cut it."
        )
    return text_words(text) if isinstance(text, str) else given_words(text).reshape(-1, 2)


def _encoder_scores(
    model: EncoderModel, texts: Sequence[Text], words: Sequence[NDArray[np.int64]], pooling: Pooling
) -> Scores:
    stride = (model.encoder.max_length - 4) // _SHARED
    windows = [model.encoder.windows(text, stride) for text in texts]
    rows = iter(model.score_tokens([window for each in windows for window in each]))
    scheme, parts, read = LabelScheme(model.labels), [], []
    for own, places in zip(windows, words, strict=True):
        tokens = merge_windows(own, [log_softmax(next(rows)) for _ in own])
        logs, present = on_words(tokens.log_probabilities, tokens.offsets, places, scheme, pooling)
        parts.append(logs)
        read.append(present)
    return Scores(np.concatenate(parts), np.concatenate(read))


def _rule_scores(model: RulesModel, texts: Sequence[Text], words: Sequence[NDArray[np.int64]]) -> Scores:
    found = [
        model.matcher.score_words(joined(text), [(int(start), int(end)) for start, end in places])
        for text, places in zip(texts, words, strict=True)
    ]
    logits = np.concatenate([each.logits for each in found]).astype(np.float32)
    return Scores(logits, ~np.concatenate([each.abstains for each in found]))
