"""Labeled examples: texts with the labels that a mixture over labels should give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgemix.errors import InputError
from edgemix.recipe.text_sources import read_objects

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgemix.tasks import LabelTaskName


class LabeledSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A .jsonl, .ndjson or .json file of objects, each an example; the names of the fields that are read.

    Attributes:
        file: Its path.
        text: Field of the text. Where it holds a list of words, they are the text.
        pair: Field of the second text of a pair.
        label: Field of the label: a text, a number (an index into the model's labels, or a name), or true and false; a
            list of them where an example may have several labels, and of one for each word for token-classification.
    """

    file: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None


class Example(NamedTuple):
    """A text with its labels.

    Attributes:
        text: The text, or its words.
        pair: The second text of a pair.
        labels: Names of its labels: one, any number for several labels, one for each word; None where it has none.
    """

    text: str | tuple[str, ...]
    pair: str | None
    labels: tuple[str, ...] | None


_TEXT = {"token-classification": ("tokens", "words", "text")}
_LABEL = {"token-classification": ("labels", "ner_tags", "tags")}
"""Names of fields, in the order in which they are looked for where a source names none."""


def read_examples(source: LabeledSource, folder: Path, task: LabelTaskName, *, labeled: bool = True) -> list[Example]:
    """Read a file of examples.

    Args:
        source: The file and its fields.
        folder: What a relative path is relative to.
        task: What is predicted, which decides the fields' default names: `text` and `label`; `tokens` and `labels` for
            token-classification; `text` alone, with a mask token, and `label` for fill-mask.
        labeled: Whether every example needs a label.

    Raises:
        InputError: The file is missing, no JSON objects, empty, or an object lacks a field or has another type in it.
    """
    texts = (source.text,) if source.text else _TEXT.get(task, ("text", "sentence"))
    labels = (source.label,) if source.label else _LABEL.get(task, ("label", "labels"))
    examples = []
    for where, fields in read_objects(source.file, folder):
        text = _text(where, _field(where, fields, texts))
        pair = _text(where, _field(where, fields, (source.pair,))) if source.pair else None
        if not isinstance(pair, str | None):
            raise InputError(f"{where}: the field {source.pair!r} is a list of words; a pair is of two texts")
        found = _labels(where, next((fields[name] for name in labels if name in fields), None))
        if found is None and labeled:
            _field(where, fields, labels)
        if found is not None and task == "token-classification":
            _check_words(where, text, found)
        examples.append(Example(text, pair, found))
    if not examples:
        raise InputError(f"{source.file}: has no examples", "Name a file that holds some, a JSON object a line.")
    return examples


def label_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the labels of examples, in the order of their first use."""
    return tuple(dict.fromkeys(name for example in examples for name in example.labels or ()))


def _field(where: str, fields: Mapping[str, object], names: Sequence[str]) -> object:
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise InputError(
        f"{where}: has no field {' or '.join(map(repr, names))}",
        f"Its fields: {', '.join(list(fields)[:10]) or 'none'}. Name those to read in the recipe: "
        "{file: ..., text: NAME, label: NAME}.",
    )


def _text(where: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise InputError(f"{where}: its text is neither text nor a list of words")


def _labels(where: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(_names(where, value if isinstance(value, list) else [value]))


def _names(where: str, values: list[object]) -> Iterator[str]:
    for value in values:
        if not isinstance(value, str | int) or value == "":
            raise InputError(f"{where}: a label is neither text nor a whole number")
        yield str(value).lower() if isinstance(value, bool) else str(value)


def _check_words(where: str, text: str | tuple[str, ...], labels: tuple[str, ...]) -> None:
    if isinstance(text, str):
        raise InputError(f"{where}: its labels are of words, and its text is no list of words")
    if len(text) != len(labels):
        raise InputError(f"{where}: {len(labels)} labels for {len(text)} words")
