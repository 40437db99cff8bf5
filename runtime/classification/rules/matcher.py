"""Score texts and words by rules, telling which rules fired where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import InputError
from edgemix.recipe.rules_file import entries_of
from edgemix.runtime.classification.rules.phrases import MAX_WORDS, Entry, PhraseTrie, pieces_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemix.recipe.rules_file import Pattern, RuleSet

MAX_PATTERN_MEMORY = 8 << 20
MAX_MATCHES = 1_000
"""Most matches of a pattern in a text: each may look at the whole rest of it."""
_SATURATION = 15.0
"""As VADER's: a sum of strengths s counts as s / sqrt(s² + 15)."""


@dataclass(frozen=True)
class FiredRule:
    """A rule that fired: its place in characters, its words or pattern, its label, and its strength after negations
    and boosters.
    """

    start: int
    end: int
    rule: str
    label: str
    strength: float


@dataclass(frozen=True)
class RuleScore:
    """A text's float32 logits [labels], the rules that fired, and whether none did."""

    logits: np.ndarray
    fired: tuple[FiredRule, ...]
    abstains: bool


@dataclass(frozen=True)
class WordScores:
    """Float32 logits [words, labels] over `RuleMatcher.word_labels`, and for each word whether no rule fired on it."""

    logits: np.ndarray
    fired: tuple[FiredRule, ...]
    abstains: np.ndarray


class RuleMatcher:
    """Compiled rules.

    Attributes:
        labels: The labels of texts.
        word_labels: The labels of words: B- and I- of each label.

    Raises:
        InputError: A pattern is invalid or too large, or google-re2 is missing.
    """

    def __init__(self, rules: RuleSet) -> None:
        self.labels = rules.labels
        self.word_labels = tuple(prefix + label for label in rules.labels for prefix in ("B-", "I-"))
        self._rules = rules
        self._index = {label: index for index, label in enumerate(rules.labels)}
        negative, positive = (self._index[label] for label in rules.axis) if rules.axis else (-1, -1)
        self._opposite = {negative: positive, positive: negative}
        self._trie = PhraseTrie()
        for found in entries_of(rules):
            self._add(found.text, Entry(None, self._index[found.label], found.strength))
        for gazetteer in rules.gazetteers:
            for name in gazetteer.names:
                exact = name if gazetteer.case_sensitive else None
                self._add(name, Entry(exact, self._index[gazetteer.label], gazetteer.strength))
        for text in rules.negations:
            self._add(text, Entry(None, None, 0.0, negates=True))
        for text, boost in rules.boosters.items():
            self._add(text, Entry(None, None, boost))
        self._patterns = [(rule, _compiled(rule)) for rule in rules.patterns]

    def score(self, text: str) -> RuleScore:
        """Return a text's logits and what fired."""
        fired = tuple(self._fired(text))
        totals = np.zeros(len(self.labels))
        for rule in fired:
            totals[self._index[rule.label]] += rule.strength
        if fired and self._rules.exclamation:
            totals[totals.argmax()] += self._rules.exclamation * min(text.count("!"), 4)
        return RuleScore(_normalized(totals), fired, not totals.any())

    def score_batch(self, texts: Sequence[str]) -> list[RuleScore]:
        """Return each text's score."""
        return [self.score(text) for text in texts]

    def score_words(self, text: str, offsets: Sequence[tuple[int, int]]) -> WordScores:
        """Return the scores of words, given by their places in the text, in order and not overlapping."""
        fired = tuple(self._fired(text))
        totals = np.zeros((len(offsets), len(self.word_labels)))
        starts, ends = (np.array([place[side] for place in offsets], np.int64) for side in (0, 1))
        abstains = np.ones(len(offsets), bool)
        for rule in fired:
            first, last = np.searchsorted(ends, rule.start, "right"), np.searchsorted(starts, rule.end, "left")
            if first < last:
                column = 2 * self._index[rule.label]
                totals[first, column] += rule.strength
                totals[first + 1 : last, column + 1] += rule.strength
                abstains[first:last] = False
        return WordScores(_normalized(totals), fired, abstains)

    def _add(self, text: str, entry: Entry) -> None:
        if not self._trie.add(text, entry):
            raise InputError(f"the rule {text[:80]!r} needs 1 to {MAX_WORDS} words and signs")

    def _fired(self, text: str) -> Iterator[FiredRule]:
        pieces = pieces_of(text)
        words = np.cumsum([piece.is_word for piece in pieces]).tolist()
        shouts = self._rules.capitals if not text.isupper() else 0.0
        modifiers: list[tuple[int, Entry]] = []
        for match in self._trie.find(text, pieces):
            place = pieces[match.first].start, pieces[match.last].end
            for entry in match.entries:
                if entry.label is not None:
                    near = _in_reach(modifiers, words[match.first], self._rules.reach)
                    yield self._rule(text, place, entry, near, shouts)
            modifiers += [(words[match.last], entry) for entry in match.entries if entry.label is None]
        for rule, compiled in self._patterns:
            for count, found in enumerate(compiled.finditer(text)):
                if count >= MAX_MATCHES:
                    break
                if found.end() > found.start():
                    yield FiredRule(found.start(), found.end(), rule.pattern, rule.label, rule.strength)

    def _rule(
        self, text: str, place: tuple[int, int], entry: Entry, near: list[tuple[int, Entry]], shouts: float
    ) -> FiredRule:
        start, end = place
        written = text[start:end]
        strength, label = entry.strength, entry.label or 0
        sign = 1.0 if strength >= 0 else -1.0
        if shouts and written.isupper():
            strength += sign * shouts
        for distance, modifier in near:
            strength += sign * modifier.strength * max(0.0, 1 - self._rules.damping * (distance - 1))
        if any(modifier.negates for _, modifier in near):
            strength *= self._rules.negation
        if strength < 0 and label in self._opposite:
            strength, label = -strength, self._opposite[label]
        return FiredRule(start, end, written, self.labels[label], strength)


def _in_reach(modifiers: list[tuple[int, Entry]], word: int, reach: int) -> list[tuple[int, Entry]]:
    """Return the modifiers at most `reach` words before a word, with their distances."""
    recent = modifiers[-2 * reach :]
    return [(max(1, word - at), entry) for at, entry in recent if word - at <= reach]


def _normalized(totals: np.ndarray) -> np.ndarray:
    size = np.sqrt((totals * totals).sum(axis=-1, keepdims=True) + _SATURATION)
    return np.asarray(totals / size, np.float32)


def _compiled(rule: Pattern) -> Any:
    try:
        import re2
    except ImportError:
        raise InputError("rules with patterns need google-re2", "pip install 'edgemix[rules]'") from None
    options = re2.Options()
    options.max_mem = MAX_PATTERN_MEMORY
    options.case_sensitive = rule.case_sensitive
    options.log_errors = False
    try:
        return re2.compile(rule.pattern, options=options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise InputError(f"the pattern {rule.pattern[:80]!r} is not one of RE2's: {reason}") from None
