"""The loaded members of a mixture over labels: models, and rules, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgemix.bundle.label_bundle.manifest import EncoderMember, RulesMember
from edgemix.bundle.paths import resolve
from edgemix.errors import BundleError, InputError
from edgemix.recipe.rules_file import RuleSet
from edgemix.runtime.classification.encoding import TextEncoder, joined
from edgemix.runtime.graphs.encoder import EncoderGraph

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.label_bundle.manifest import LabelMember, MemberTokenizer
    from edgemix.runtime.classification.encoding import EncodedText, Text
    from edgemix.runtime.classification.rules import RuleMatcher
    from edgemix.runtime.graphs.providers import Provider

BATCH_TOKENS = 2048
"""Most tokens of a call, padding included: more do not make it faster, and its memory grows with them."""


class Scores(NamedTuple):
    """What a member says of texts.

    Attributes:
        logits: float32 [texts, its labels].
        present: Where it has an opinion [texts]; elsewhere it abstains.
    """

    logits: NDArray[np.float32]
    present: NDArray[np.bool_]


class LabelModel(Protocol):
    """A member, loaded.

    Attributes:
        name: Its name in the manifest.
        labels: The mixture's names of its columns.
        temperature: What its logits are divided by.
        cost: Relative cost of a call.
    """

    name: str
    labels: tuple[str, ...]
    temperature: float
    cost: float

    def score(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> Scores:
        """Return its logits of texts, or of pairs of texts."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_encoder(bundle: Path, tokenizer: MemberTokenizer) -> TextEncoder:
    """Open a member's tokenizer.

    Raises:
        BundleError: It is damaged.
    """
    return TextEncoder.load(
        resolve(bundle, tokenizer.path),
        max_length=tokenizer.max_length,
        special_tokens=tokenizer.special_tokens,
        pad_type_id=tokenizer.pad_type_id,
        padding_side=tokenizer.padding_side,
        vocabulary=tokenizer.vocabulary,
    )


class EncoderModel:
    """A member that is a model, with its own tokenizer."""

    def __init__(self, entry: EncoderMember, graph: EncoderGraph, encoder: TextEncoder) -> None:
        self.name, self.labels, self.temperature, self.cost = entry.name, entry.labels, entry.temperature, entry.cost
        self.graph, self.encoder = graph, encoder

    @classmethod
    def load(
        cls,
        bundle: Path,
        entry: EncoderMember,
        provider: Provider,
        threads: int | None = None,
    ) -> EncoderModel:
        """Open a member's graph and tokenizer.

        Raises:
            BundleError: One is damaged, or its logits are not those of its labels.
        """
        graph = EncoderGraph.load(resolve(bundle, entry.graph), provider, threads=threads, name=entry.name)
        if entry.labels and graph.labels != len(entry.labels):
            raise BundleError(
                f"{bundle}: {entry.name} has {graph.labels} logits for {len(entry.labels)} labels",
                "Export the bundle again.",
            )
        return cls(entry, graph, open_encoder(bundle, entry.tokenizer))

    def score(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> Scores:
        encoded = self.encoder.encode_batch(texts, pairs)
        logits = np.empty((len(encoded), self.graph.labels), np.float32)
        for places, batch in self.encoder.batches(encoded, BATCH_TOKENS):
            logits[places] = self.graph.run(batch.ids, batch.attention_mask, batch.type_ids)
        return Scores(logits, np.ones(len(encoded), np.bool_))

    def score_tokens(self, encoded: Sequence[EncodedText]) -> list[NDArray[np.float32]]:
        """Return the logits [tokens, labels] of each text's tokens, special tokens included."""
        found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(encoded)
        for places, batch in self.encoder.batches(encoded, BATCH_TOKENS):
            logits = self.graph.run(batch.ids, batch.attention_mask, batch.type_ids)
            for row, place in enumerate(places):
                found[place] = logits[row, batch.attention_mask[row] > 0]
        return found

    def close(self) -> None:
        del self.graph


class RulesModel:
    """A member that is the written rules of a human expert; it abstains where none of them fires."""

    def __init__(self, entry: RulesMember, matcher: RuleMatcher) -> None:
        self.name, self.labels, self.temperature, self.cost = entry.name, entry.labels, entry.temperature, entry.cost
        self.matcher = matcher

    @classmethod
    def load(cls, bundle: Path, entry: RulesMember) -> RulesModel:
        """Read a member's rules.

        Raises:
            BundleError: They are damaged, or not of its labels.
        """
        from edgemix.runtime.classification.rules import RuleMatcher

        path = resolve(bundle, entry.rules)
        try:
            matcher = RuleMatcher(RuleSet.load_stored(path))
        except InputError as error:
            raise BundleError(f"{bundle}: the rules of {entry.name}: {error.message}", error.remedy) from None
        if len(entry.labels) not in (len(matcher.labels), len(matcher.word_labels)):
            raise BundleError(
                f"{bundle}: the rules of {entry.name} have {len(matcher.labels)} labels, and not {len(entry.labels)}",
                "Export the bundle again.",
            )
        return cls(entry, matcher)

    def score(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> Scores:
        """Score texts; of a pair both, one after the other."""
        both = (
            texts if pairs is None else [f"{joined(one)}\n{joined(two)}" for one, two in zip(texts, pairs, strict=True)]
        )
        found = [self.matcher.score(joined(text)) for text in both]
        logits = np.array([each.logits for each in found], np.float32).reshape(len(found), len(self.labels))
        return Scores(logits, np.array([not each.abstains for each in found], np.bool_))

    def close(self) -> None:
        """Nothing is held."""


def open_member(bundle: Path, entry: LabelMember, provider: Provider, threads: int | None = None) -> LabelModel:
    """Open a member of any kind.

    Raises:
        BundleError: Its files are damaged.
    """
    if isinstance(entry, EncoderMember):
        return EncoderModel.load(bundle, entry, provider, threads)
    return RulesModel.load(bundle, entry)
