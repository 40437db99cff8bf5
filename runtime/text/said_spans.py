"""Where a conversation, as a chat template writes it, holds special tokens that messages said."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MARKS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
"""Private-use characters, which take the places of what messages say."""
_REMEDY = "Leave them out of the messages, or pass parse_special=True."


def said_spans(
    text: str, values: Any, template: str, tokens: tuple[str, ...], render: Callable[[Any, dict[int, str]], str]
) -> tuple[tuple[int, int], ...]:
    """Return the spans of characters of a text that look like tokens, and that begin in what messages say.

    The messages are written a second time, with marks for characters that begin tokens. What the template compares is
    compared without the marks, so that every character keeps its place, whatever the template cuts, joins or tests.
    Where that does not hold, as for texts that the template escapes, messages that hold tokens are refused.

    Args:
        text: The conversation as text.
        values: What the template was given: messages and tools.
        template: Jinja source.
        tokens: Tokens to look for.
        render: Renders the template with other values, and with what their characters stand for in comparisons.

    Raises:
        InputError: The template changes what messages say so that tokens of theirs cannot be told from its own.
    """
    pattern = _any_of(tokens)
    texts = "".join(_strings(values))
    first = sorted({token[0] for token in tokens if token})
    if not any(character in texts for character in first) or pattern.search(text) is None:
        return ()
    used = {*texts, *template}
    marks = list(islice((each for each in map(chr, chain(*_MARKS)) if each not in used), len(first)))
    if len(marks) < len(first):
        raise InputError("the messages hold too many private-use characters", _REMEDY)
    table = {ord(character): mark for character, mark in zip(first, marks, strict=True)}
    originals = {ord(mark): character for character, mark in zip(first, marks, strict=True)}
    try:
        marked = render(
            _translated(values, table, lambda key: pattern.search(key) or not _names(template, key)), originals
        )
    except InputError:  # the template refuses other characters: nothing is known of it
        marked = ""
    if marked.translate(originals) == text:
        return tuple(match.span() for match in pattern.finditer(text) if marked[match.start()] in marks)
    if pattern.findall(marked) != pattern.findall(text) or any(map(pattern.search, _strings(values))):
        raise InputError(
            "the chat template changes what messages say, which hold special tokens: they cannot be told from its own",
            _REMEDY,
        )
    return ()


@lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _names(template: str, key: str) -> bool:
    """Return whether a template looks a key up by its name."""
    name = re.escape(key)
    return bool(re.search(rf"\b{name}\b" if key.isidentifier() else rf"""(['"]){name}\1""", template))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _translated(value: Any, table: dict[int, str], is_said: Callable[[str], object]) -> Any:
    """Return a copy with characters replaced in every text, and in the keys that are said."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {
            key.translate(table) if is_said(key) else key: _translated(item, table, is_said)
            for key, item in value.items()
        }
    return [_translated(item, table, is_said) for item in value] if isinstance(value, list) else value
