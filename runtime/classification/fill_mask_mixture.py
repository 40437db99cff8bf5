"""`FillMask`: a mixture whose y is the word in the place of a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.classification.fill_mask import (
    mask_places,
    shared_distribution,
    shared_vocabulary,
    top_strings,
    with_own_mask,
)
from edgemix.runtime.classification.loaded import LabelMixture
from edgemix.runtime.classification.members import EncoderModel, Scores
from edgemix.runtime.mixing.arithmetic import log_softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.label_bundle.manifest import LabelManifest
    from edgemix.runtime.classification.encoding import Text
    from edgemix.runtime.classification.loaded import LabelWeights
    from edgemix.runtime.classification.members import LabelModel
    from edgemix.runtime.graphs.providers import Provider
    from edgemix.tasks import LabelCombine, LabelTaskName

CHUNK = 32
"""Texts that are read at once: their logits are over a vocabulary."""


@dataclass(frozen=True, slots=True)
class MaskPrediction:
    """The most probable words in the place of a mask, with their probabilities, the most probable first."""

    words: tuple[tuple[str, float], ...]


class FillMask(LabelMixture):
    """A loaded mixture of masked language models. Those of one vocabulary mix over all of it, others over the whole
    words that all of them know; see `fill_mask`.

    Attributes:
        labels: The words that are mixed over.
    """

    task: ClassVar[LabelTaskName] = "fill-mask"

    def __init__(self, manifest: LabelManifest, models: Sequence[LabelModel], provider: Provider) -> None:
        super().__init__(manifest, models, provider)
        self._encoders = [model.encoder for model in models if isinstance(model, EncoderModel)]
        self.vocabulary = shared_vocabulary(self._encoders)
        self.labels = self.vocabulary.strings
        self.known = np.ones((len(models), len(self.labels)), np.bool_)
        self._masks = [
            each.special_tokens["mask_token"] for each in self._encoders if "mask_token" in each.special_tokens
        ]

    def predict(
        self,
        text: str,
        *,
        top: int = 5,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
    ) -> list[MaskPrediction]:
        """Return the words in the places of a text's masks, in order; see `predict_batch`."""
        return self.predict_batch([text], top=top, weights=weights, combine=combine)[0]

    def predict_batch(
        self,
        texts: Sequence[str],
        *,
        top: int = 5,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> list[list[MaskPrediction]]:
        """Return the words in the places of texts' masks.

        Args:
            texts: Each with a mask at least, as any member writes it.
            top: Words of each place.
            weights: See `LabelWeights`.
            combine: How the members' distributions are mixed.
            progress: Progress callback, in texts.

        Raises:
            InputError: A text has no mask, or is too long for a member; or an option is out of its bounds.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts", "Use predict for one text.")
        if not 1 <= top <= len(self.labels):
            raise InputError(f"top must be between 1 and the vocabulary, {len(self.labels):,} words, not {top}")
        shares, how = self.shares(weights), self.combine_option(combine)
        found: list[list[MaskPrediction]] = []
        with progress.stage("predict", len(texts)) as task:
            for first in range(0, len(texts), CHUNK):
                chunk = texts[first : first + CHUNK]
                scores, counts = self.score_texts(chunk)
                mixed, start = self.mixed(scores, shares, how), 0
                for count in counts:
                    rows = mixed[start : start + count].astype(np.float32)
                    found.append([MaskPrediction(top_strings(row, self.vocabulary, top)) for row in rows])
                    start += count
                task.advance(len(chunk))
        return found

    def score_texts(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> tuple[list[Scores], list[int]]:
        if pairs is not None or not all(isinstance(text, str) for text in texts):
            raise InputError("fill-mask reads texts, and no pairs or lists of words")
        found, counts = [], [0] * len(texts)
        for model in self.models:
            if not isinstance(model, EncoderModel):
                raise InputError("fill-mask has no rules")
            mask, parts = model.encoder.special_tokens.get("mask_token", ""), []
            own = [with_own_mask(str(text), self._masks, mask) for text in texts]
            encoded = model.encoder.encode_batch([text for text, _ in own])
            rows = model.score_tokens(encoded)
            for place, (each, (_, count)) in enumerate(zip(encoded, own, strict=True)):
                parts.append(rows[place][mask_places(each, model.encoder, count)])
                counts[place] = count
            found.append(Scores(np.concatenate(parts), np.ones(sum(counts), np.bool_)))
        return found, counts

    def spread(self, member: int, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        scaled = log_softmax(logits / np.float32(self.models[member].temperature))
        return shared_distribution(scaled, self.vocabulary.ids[member])[0].astype(np.float64)
