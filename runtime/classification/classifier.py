"""`Classifier`: a mixture whose y is a label of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.cancellation import in_thread
from edgemix.runtime.classification.explaining import LONGEST_TEXT, Explanation, effects, occluded, parts_of
from edgemix.runtime.classification.feedback import Feedback, feedback_of, refit
from edgemix.runtime.classification.loaded import LabelMixture
from edgemix.runtime.classification.members import RulesModel
from edgemix.runtime.mixing.arithmetic import normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import Text
    from edgemix.runtime.classification.loaded import LabelWeights
    from edgemix.tasks import LabelCombine, LabelTaskName

CHUNK = 1024
"""Texts that are read at once: a bounded part of what a program gives."""
_MARGIN = 1e-6
"""A lead smaller than this may be rounding."""


@dataclass(frozen=True, slots=True)
class MemberOpinion:
    """What a member says of a text.

    Attributes:
        probabilities: Its own distribution over the labels that it knows.
        weight: Its weight in the mixture for this text; the weight of members that abstain goes to the others.
        share: Its share in the probability of the label that the mixture chose, of linear mixtures; else None.
    """

    probabilities: dict[str, float]
    weight: float
    share: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one text.

    Attributes:
        labels: The labels that it has, the most probable first: one, or any number where several are allowed.
        probabilities: Label -> probability. They sum to one, unless several labels are allowed. Empty where only the
            decision was asked for.
        members: Member name -> its opinion; None for one that abstains. Empty where only the decision was asked for.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    members: dict[str, MemberOpinion | None]

    @property
    def label(self) -> str | None:
        """The most probable of its labels; None where it has none."""
        return self.labels[0] if self.labels else None


class Opinions:
    """What members say of texts, as far as they were asked.

    Attributes:
        log_probabilities: float64 [members, texts, labels (, 2)]; see `LabelMixture.spread`.
        present: Where a member was asked and has an opinion [members, texts].
    """

    def __init__(self, shape: tuple[int, ...], members: int) -> None:
        self.log_probabilities = np.zeros((members, *shape))
        self.present = np.zeros((members, shape[0]), np.bool_)


class Classifier(LabelMixture):
    """A loaded mixture of classifiers.

    with Classifier.load("bundle") as classifier:
        print(classifier.predict("What a film!").label)
    """

    task: ClassVar[LabelTaskName] = "text-classification"

    def predict(
        self,
        text: Text,
        pair: Text | None = None,
        *,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
        decision: bool = False,
    ) -> Prediction:
        """Predict the label of a text, or of a pair of texts; see `predict_batch`."""
        pairs = None if pair is None else [pair]
        return self.predict_batch([text], pairs, weights=weights, combine=combine, decision=decision)[0]

    def predict_batch(
        self,
        texts: Sequence[Text],
        pairs: Sequence[Text] | None = None,
        *,
        weights: LabelWeights = None,
        combine: LabelCombine | None = None,
        decision: bool = False,
        progress: Progress = NO_PROGRESS,
    ) -> list[Prediction]:
        """Predict the labels of texts.

        Texts of similar length are read together; what comes out does not depend on the others.

        Args:
            texts: Texts of any length, of which members read the beginning that they can; or lists of words.
            pairs: The second text of each pair.
            weights: See `LabelWeights`.
            combine: How the members' distributions are mixed; as the bundle says by default.
            decision: Tell the label only. Members are asked in turn, the cheap ones first, and the others only about
                texts whose label they can still change: it is always the label of the full mixture.
            progress: Progress callback, in texts.

        Raises:
            InputError: A text is none, or an option is out of its bounds.
            EdgemixError: A graph fails.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts", "Use predict for one text.")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"{len(pairs)} second texts for {len(texts)} texts", "Give one for each.")
        shares, how = self.shares(weights), self.combine_option(combine)
        found: list[Prediction] = []
        with progress.stage("predict", len(texts)) as task:
            for first in range(0, len(texts), CHUNK):
                chunk = texts[first : first + CHUNK]
                seconds = None if pairs is None else pairs[first : first + CHUNK]
                if decision:
                    found += self._decide(chunk, seconds, shares, how)
                else:
                    opinions = self.opinions(chunk, seconds, np.flatnonzero(shares))
                    found += self._predictions(opinions, shares, how)
                task.advance(len(chunk))
        return found

    async def apredict(self, text: Text, pair: Text | None = None, **options: object) -> Prediction:
        """As `predict`, for asyncio: the work is done in a thread, and cancelled with the task."""
        return await in_thread(lambda: self.predict(text, pair, **options))  # type: ignore[arg-type]

    async def apredict_batch(
        self, texts: Sequence[Text], pairs: Sequence[Text] | None = None, **options: object
    ) -> list[Prediction]:
        """As `predict_batch`, for asyncio."""
        return await in_thread(lambda: self.predict_batch(texts, pairs, **options))  # type: ignore[arg-type]

    def explain(self, text: str, *, weights: LabelWeights = None, combine: LabelCombine | None = None) -> Explanation:
        """Tell why a text has its label: each member's share, the rules that fired, and which words mattered.

        A word matters as much as the label's probability falls when it is left out; all texts without a word are read
        as a batch. Of texts of more than `explaining.MOST_PARTS` words, several are left out at once; of texts of more
        than `explaining.LONGEST_TEXT` characters, the beginning is explained.

        Args:
            text: The text.
            weights: See `LabelWeights`.
            combine: How the members' distributions are mixed; as the bundle says by default.

        Raises:
            InputError: As `predict_batch`.
        """
        text = text[:LONGEST_TEXT]
        parts = parts_of(text)
        whole, *without = self.predict_batch([text, *occluded(text, parts)], weights=weights, combine=combine)
        rules = {model.name: model.matcher.score(text).fired for model in self.models if isinstance(model, RulesModel)}
        return Explanation(whole, effects(text, parts, whole, without), rules)

    def feedback(
        self,
        texts: Sequence[Text],
        labels: Sequence[str],
        pairs: Sequence[Text] | None = None,
        *,
        dry_run: bool = False,
    ) -> Feedback:
        """Refit the weights to corrected answers, without the examples that they were fitted to before.

        Args:
            texts: The texts.
            labels: The right label of each.
            pairs: The second text of each pair.
            dry_run: Tell what would change, and change nothing. Otherwise this object has the new weights; `save`
                writes them to the bundle.

        Raises:
            InputError: A label is none of the bundle's, examples may have several labels, or the mixture is not linear.
        """
        if self.manifest.multi_label:
            raise InputError("feedback is for examples of one label each")
        if not len(texts) or len(texts) != len(labels):
            raise InputError(f"{len(labels)} labels for {len(texts)} texts", "Give one for each text.")
        if unknown := sorted(set(labels) - set(self.labels)):
            raise InputError(
                f"the labels {', '.join(map(repr, unknown[:10]))} are none of the bundle's",
                f"Its labels: {', '.join(self.labels[:20])}.",
            )
        logs, present = self.spread_all(self.score_texts(texts, pairs)[0])
        targets = np.array([self.labels.index(label) for label in labels], np.int64)
        manifest = refit(self.manifest, logs[:, np.arange(len(targets)), targets], present)
        old, new = self.shares(), normalize(manifest.weights.default, self.members)
        right, after = (self.mix(logs, each, "linear", present).argmax(axis=-1) == targets for each in (old, new))
        found = feedback_of(self.weights, manifest.weights.default, right=right, right_after=after)
        if not dry_run:
            self.manifest, self.weights = manifest, dict(manifest.weights.default)
        return found

    def opinions(
        self,
        texts: Sequence[Text],
        pairs: Sequence[Text] | None = None,
        members: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> Opinions:
        """Ask members about texts.

        Args:
            texts: The texts.
            pairs: The second text of each pair.
            members: Indices of those to ask; all by default.
        """
        found = self._nothing(len(texts))
        for member in range(len(self.members)) if members is None else members:
            self._ask(found, int(member), texts, pairs, np.arange(len(texts)))
        return found

    def _nothing(self, texts: int) -> Opinions:
        shape = (texts, len(self.labels), 2) if self.manifest.multi_label else (texts, len(self.labels))
        return Opinions(shape, len(self.members))

    def _ask(
        self,
        opinions: Opinions,
        member: int,
        texts: Sequence[Text],
        pairs: Sequence[Text] | None,
        places: NDArray[np.int64],
    ) -> None:
        """Ask a member about the texts at `places`."""
        chosen = [texts[place] for place in places]
        scores = self.models[member].score(chosen, None if pairs is None else [pairs[place] for place in places])
        opinions.log_probabilities[member, places] = self.spread(member, scores.logits)
        opinions.present[member, places] = scores.present

    def _predictions(self, opinions: Opinions, shares: NDArray[np.float64], how: LabelCombine) -> list[Prediction]:
        mixed = self.mix(opinions.log_probabilities, shares, how, opinions.present)
        return [
            Prediction(
                labels,
                self._named(mixed[text], range(len(self.labels))),
                self._opinions_of(opinions, text, shares, mixed=mixed[text] if how == "linear" else None),
            )
            for text, labels in enumerate(self._chosen(mixed))
        ]

    def _chosen(self, mixed: NDArray[np.float64]) -> list[tuple[str, ...]]:
        """Return the labels of each text, the most probable first."""
        if not self.manifest.multi_label:
            return [(self.labels[best],) for best in mixed.argmax(axis=-1)]
        order = np.argsort(-mixed[..., 1], axis=-1, kind="stable")
        return [
            tuple(self.labels[label] for label in ranks if text[label, 1] > text[label, 0])
            for text, ranks in zip(mixed, order, strict=True)
        ]

    def _named(self, log_probabilities: NDArray[np.float64], labels: Sequence[int]) -> dict[str, float]:
        values = log_probabilities[..., 1] if self.manifest.multi_label else log_probabilities
        return {self.labels[label]: float(np.exp(values[label])) for label in labels}

    def _opinions_of(
        self,
        opinions: Opinions,
        text: int,
        shares: NDArray[np.float64],
        *,
        mixed: NDArray[np.float64] | None,
    ) -> dict[str, MemberOpinion | None]:
        """Return the members' opinions of a text; their shares of what a linear mixture chose, of its distribution."""
        present = opinions.present[:, text] & (shares > 0)
        total = shares[present].sum()
        found: dict[str, MemberOpinion | None] = {}
        for member, name in enumerate(self.members):
            if shares[member] == 0:
                continue
            if not present[member]:
                found[name] = None
                continue
            own, weight, share = opinions.log_probabilities[member, text], float(shares[member] / total), None
            if mixed is not None and not self.manifest.multi_label:
                best = int(mixed.argmax())
                share = weight * float(np.exp(own[best] - mixed[best]))
            columns = np.flatnonzero(self.known[member]).tolist()
            found[name] = MemberOpinion(self._named(own, columns), weight, share)
        return found

    def _decide(
        self, texts: Sequence[Text], pairs: Sequence[Text] | None, shares: NDArray[np.float64], how: LabelCombine
    ) -> list[Prediction]:
        """Ask members in turn, the cheap ones first, and the others about texts whose label they can still change."""
        opinions, open_texts = self._nothing(len(texts)), np.arange(len(texts))
        order = sorted(np.flatnonzero(shares).tolist(), key=lambda member: self.models[member].cost)
        for place, member in enumerate(order):
            self._ask(opinions, member, texts, pairs, open_texts)
            left = shares[order[place + 1 :]].sum()
            if how == "linear" and left > 0:
                open_texts = open_texts[self._undecided(opinions, open_texts, shares, left)]
                if not len(open_texts):
                    break
        mixed = self.mix(opinions.log_probabilities, shares, how, opinions.present)
        return [Prediction(labels, {}, {}) for labels in self._chosen(mixed)]

    def _undecided(
        self, opinions: Opinions, texts: NDArray[np.int64], shares: NDArray[np.float64], left: float
    ) -> NDArray[np.bool_]:
        """Return the texts whose label members of the weight `left` can still change.

        The label is the largest of sum_i w_i P_i(y) over the members that have an opinion; whether another abstains
        scales all sums alike. What is left can add its weight to one label, and nothing to the others.
        """
        present = opinions.present[:, texts] * shares[:, None]
        probabilities = np.exp(opinions.log_probabilities[:, texts])
        if self.manifest.multi_label:
            asked = present[:, :, None, None] * self.known[:, None, :, None]
            no, yes = np.moveaxis((asked * probabilities).sum(axis=0), -1, 0)
            return np.asarray((np.abs(yes - no) <= left + _MARGIN).any(axis=-1))
        sums = (present[..., None] * np.where(self.known[:, None], probabilities, 0.0)).sum(axis=0)
        second, first = np.moveaxis(np.sort(sums, axis=-1)[:, -2:], -1, 0)
        return np.asarray(first - second <= left + _MARGIN)
