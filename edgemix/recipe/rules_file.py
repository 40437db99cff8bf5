"""Files of rules: what a human expert knows about labels, as words with scores, phrases, patterns and names."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta

from edgemix.errors import InputError, storage_errors
from edgemix.numbers import is_finite
from edgemix.recipe.bounds import bound_problems
from edgemix.recipe.problems import Problem, did_you_mean
from edgemix.recipe.yaml_loader import read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemix.recipe.problems import Where

MAX_BYTES = 64 << 20
MAX_YAML_BYTES = 4 << 20
MAX_ENTRIES = 1_000_000
MAX_LABELS = 1_000
MAX_PATTERNS = 1_000
MAX_LENGTH = 1_000
"""Most characters of an entry, a phrase, a name or a pattern."""
_MAX_PROBLEMS = 50

_Strength = Annotated[float, Meta(ge=-1000, le=1000)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the parts of a file."""


class Phrase(_Part, frozen=True):
    """One or more words that speak for a label; letter case does not matter."""

    text: str
    label: str
    strength: _Strength = 1.0


class Pattern(_Part, frozen=True):
    """A regular expression, as RE2 reads it, whose matches speak for a label."""

    pattern: str
    label: str
    strength: _Strength = 1.0
    case_sensitive: bool = False


class Gazetteer(_Part, frozen=True):
    """Names that have a label, here or in a text file beside the rules, a name a line."""

    label: str
    names: tuple[str, ...] = ()
    file: str | None = None
    strength: _Strength = 1.0
    case_sensitive: bool = True


class RuleSet(_Part, frozen=True):
    """The rules of a file.

    Attributes:
        labels: The labels in order.
        axis: Two of the labels, for `scores`: the one that negative scores speak for, and the one of positive scores.
        scores: Word or words -> signed score.
        lexicon: Word or words -> label -> strength.
        negations: Words that multiply by `negation` the strength of what is up to `reach` words after them.
        boosters: Words -> what they add to the strength of what follows within reach, damped by distance.
        capitals: What a word in capitals adds to its strength in a text that is not all in capitals.
        exclamation: What each exclamation mark, up to four, adds to the label that leads.
    """

    labels: tuple[str, ...]
    axis: tuple[str, ...] = ()
    scores: dict[str, _Strength] = {}
    lexicon: dict[str, dict[str, _Strength]] = {}
    phrases: tuple[Phrase, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    gazetteers: tuple[Gazetteer, ...] = ()
    negations: tuple[str, ...] = ()
    boosters: dict[str, _Strength] = {}
    reach: Annotated[int, Meta(ge=1, le=16)] = 3
    negation: Annotated[float, Meta(ge=-1, le=1)] = -0.74
    damping: Annotated[float, Meta(ge=0, le=1)] = 0.05
    capitals: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    exclamation: Annotated[float, Meta(ge=0, le=1000)] = 0.0

    @classmethod
    def load(cls, path: Path) -> RuleSet:
        """Read a file of rules, and the files of names beside it.

        Raises:
            InputError: With the mistakes of the file, each with its line; or it is missing or too large.
        """
        return _with_names(cls.parse(_read(path), str(path)), path)

    @classmethod
    def load_stored(cls, path: Path) -> RuleSet:
        """Read the rules of a bundle, which name no other files.

        Raises:
            InputError: As `load`; or they do.
        """
        rules = cls.parse(_read(path), path.name)
        if any(gazetteer.file is not None for gazetteer in rules.gazetteers):
            raise InputError(f"{path.name}: names another file, as the rules of a bundle must not")
        return rules

    @classmethod
    def parse(cls, data: bytes, name: str = "rules") -> RuleSet:
        """Read rules from JSON or YAML.

        Raises:
            InputError: With the mistakes, each with its line.
        """
        if len(data) > MAX_BYTES:
            raise InputError(f"{name}: has more than {MAX_BYTES:,} bytes")
        try:
            rules = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        else:
            problem = next(rule_problems(rules), None)
            if problem is None:
                return rules
            if len(data) > MAX_YAML_BYTES:
                raise InputError(f"{name}: {problem}")
        if len(data) > MAX_YAML_BYTES:
            raise InputError(f"{name}: is no valid JSON of rules, and YAML may have {MAX_YAML_BYTES:,} bytes at most")
        return _parse_yaml(data, name)

    def save(self) -> bytes:
        """Return the rules as canonical JSON."""
        return msgspec.json.encode(self, order="deterministic")


class Entry(NamedTuple):
    """Words with what they speak for: the label and the strength."""

    where: Where
    text: str
    label: str
    strength: float


def entries_of(rules: RuleSet) -> Iterator[Entry]:
    """Yield scores, lexicon and phrases alike; rules with problems may have no label for a score."""
    for text, score in rules.scores.items():
        axis = rules.axis if len(rules.axis) == 2 else ("", "")
        yield Entry(("scores", text), text, axis[score > 0], abs(score))
    for text, strengths in rules.lexicon.items():
        for label, strength in strengths.items():
            yield Entry(("lexicon", text, label), text, label, strength)
    for index, phrase in enumerate(rules.phrases):
        yield Entry(("phrases", index), phrase.text, phrase.label, phrase.strength)


def rule_problems(rules: RuleSet) -> Iterator[Problem]:
    """Yield the mistakes of rules."""
    known = frozenset(rules.labels)
    if not known or len(known) != len(rules.labels):
        yield Problem(("labels",), "needs one label or more, each once")
    if len(rules.labels) > MAX_LABELS:
        yield Problem(("labels",), f"has more than {MAX_LABELS:,} labels")
    if (rules.scores and not rules.axis) or (rules.axis and (len(rules.axis) != 2 or not known.issuperset(rules.axis))):
        yield Problem(("axis",), "needs two of the labels: that of negative scores, and that of positive ones")
    if len(rules.patterns) > MAX_PATTERNS:
        yield Problem(("patterns",), f"has more than {MAX_PATTERNS:,} patterns")
    names = sum(len(gazetteer.names) for gazetteer in rules.gazetteers)
    entries = len(rules.scores) + sum(map(len, rules.lexicon.values())) + len(rules.phrases) + names
    if entries + len(rules.negations) + len(rules.boosters) > MAX_ENTRIES:
        yield Problem((), f"has more than {MAX_ENTRIES:,} entries")
        return
    yield from bound_problems(rules)
    for where, text, label, strength in _claims(rules):
        if label not in known and where[0] != "scores":
            yield Problem(where, f"unknown label {label[:80]!r}; {did_you_mean(label[:80], rules.labels[:20])}")
        if not text.strip() or len(text) > MAX_LENGTH:
            yield Problem(where, f"needs 1 to {MAX_LENGTH:,} characters")
        if not (is_finite(strength) and abs(strength) <= 1000):
            yield Problem(where, "its strength may be -1000 to 1000")


def _claims(rules: RuleSet) -> Iterator[Entry]:
    yield from entries_of(rules)
    for index, rule in enumerate(rules.patterns):
        yield Entry(("patterns", index), rule.pattern, rule.label, rule.strength)
    for index, gazetteer in enumerate(rules.gazetteers):
        yield Entry(("gazetteers", index), gazetteer.file or gazetteer.label, gazetteer.label, gazetteer.strength)
        for place, name in enumerate(gazetteer.names):
            yield Entry(("gazetteers", index, "names", place), name, gazetteer.label, gazetteer.strength)
    label = next(iter(rules.labels), "")
    for text, boost in rules.boosters.items():
        yield Entry(("boosters", text), text, label, boost)
    for index, text in enumerate(rules.negations):
        yield Entry(("negations", index), text, label, 1.0)


def _parse_yaml(data: bytes, name: str) -> RuleSet:
    try:
        document = read_yaml(data.decode().removeprefix("\ufeff"), RuleSet)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 at byte {error.start}") from None
    problems = list(document.problems)
    if document.value is not None:
        broken = {problem.where for problem in problems}
        found = islice(rule_problems(document.value), _MAX_PROBLEMS)  # each of them looks for a word that is near
        problems += [problem for problem in found if not any(problem.where[: len(at)] == at for at in broken)]
    if not problems and document.value is not None:
        return document.value
    located = sorted((document.line(problem.where), str(problem)) for problem in problems)
    lines = [f"  line {line}: {problem}" for line, problem in located[:_MAX_PROBLEMS]]
    raise InputError("\n".join([f"{name}: mistakes in the rules ({len(located)}):", *lines]))


def _read(path: Path) -> bytes:
    with storage_errors(f"reading {path}"):
        if not path.is_file():
            raise InputError(f"{path}: there is no such file of rules")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: has more than {MAX_BYTES:,} bytes")
    return data


def _with_names(rules: RuleSet, path: Path) -> RuleSet:
    """Return the rules with the names of the gazetteers' files in them."""
    gazetteers, total = [], 0
    for gazetteer in rules.gazetteers:
        if gazetteer.file is None:
            gazetteers.append(gazetteer)
            continue
        try:
            folder, file = path.parent.resolve(), (path.parent / gazetteer.file).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a circle of links
            raise InputError(f"{path}: the file {gazetteer.file[:80]!r} cannot be read: {error}") from None
        if not file.is_relative_to(folder):
            raise InputError(f"{path}: the file {gazetteer.file!r} is outside the folder of the rules")
        try:
            lines = _read(file).decode().removeprefix("\ufeff").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: is not UTF-8 at byte {error.start}") from None
        names = tuple(name for line in lines if (name := line.strip()))
        total += len(names)
        if total > MAX_ENTRIES:
            raise InputError(f"{path}: the files of its gazetteers have more than {MAX_ENTRIES:,} names")
        gazetteers.append(msgspec.structs.replace(gazetteer, names=gazetteer.names + names, file=None))
    full = msgspec.structs.replace(rules, gazetteers=tuple(gazetteers))
    for problem in rule_problems(full):
        raise InputError(f"{path}: {problem}")
    return full
