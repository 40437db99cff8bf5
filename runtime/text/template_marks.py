"""Texts in which private-use characters, marks, stand for characters that messages say.

What a template asks of such texts is answered as of those without marks, and what it cuts keeps its marks.
"""

from __future__ import annotations

from collections.abc import Callable, KeysView, Mapping
from typing import Any

_ANSWERS = frozenset({"count", "endswith", "find", "index", "rfind", "rindex", "startswith"})
"""Methods whose results hold none of the text."""
_PARTS = frozenset({"partition", "rpartition", "rsplit", "split"})
"""Methods that take a text apart at another one."""
_CUTS: dict[str, Callable[[int], slice]] = {
    "lstrip": lambda cut: slice(cut, None),
    "removeprefix": lambda cut: slice(cut, None),
    "rstrip": lambda cut: slice(None, -cut or None),
    "removesuffix": lambda cut: slice(None, -cut or None),
}
"""What methods leave of a text that they make some characters shorter."""


def unmarked(value: Any, marks: Mapping[int, str]) -> Any:
    """Return a value with the characters that marks stand for."""
    if not marks:
        return value
    if isinstance(value, str):
        return value.translate(marks)
    if isinstance(value, list | tuple):
        return type(value)([unmarked(each, marks) for each in value])
    if isinstance(value, KeysView):
        return [unmarked(each, marks) for each in value]
    if isinstance(value, dict):
        return {unmarked(key, marks): unmarked(each, marks) for key, each in value.items()}
    return value


def call_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], marks: Mapping[int, str]) -> Any:
    """Return what a method of a text returns; only marks in the text and its parts are kept."""
    plain, given = str(unmarked(text, marks)), unmarked(args, marks)
    named = unmarked(kwargs, marks)
    if name in _ANSWERS:
        return getattr(plain, name)(*given, **named)
    if name in _CUTS:
        return text[_CUTS[name](len(plain) - len(getattr(plain, name)(*given)))]
    if name == "strip":
        return call_method(call_method(text, "rstrip", args, {}, marks), "lstrip", args, {}, marks)
    separator = given[0] if given else named.get("sep")
    if name in _PARTS and isinstance(separator, str):
        parts = getattr(plain, name)(*given, **named)
        return type(parts)(_pieces(text, parts, 0 if isinstance(parts, tuple) else len(separator)))
    if name == "replace" and len(args) > 1 and given[0]:
        return args[1].join(_pieces(text, plain.split(given[0], *given[2:]), len(given[0])))
    return getattr(text, name)(*args, **kwargs)


def _pieces(text: str, parts: list[str] | tuple[str, ...], between: int) -> list[str]:
    found, end = [], 0
    for part in parts:
        found.append(text[end : end + len(part)])
        end += len(part) + between
    return found
