"""Read YAML text as typed structs by their annotations, collecting every mistake with its line.

Values are read as the type of the struct's field, so that a member may be called `no` or `1.5` without quotes. Features
that recipes do not need are refused: anchors and aliases, explicit tags, deep nesting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from edgemix.recipe.bounds import without_bounds
from edgemix.recipe.problems import Problem, Where, did_you_mean

T = TypeVar("T", bound=msgspec.Struct)
Rewrite = Callable[[Any, yaml.Node], yaml.Node]
"""Turns a short form of a type, given first, into the full one."""

MAX_DEPTH = 16
_PREFIX = "tag:yaml.org,2002:"
_TAGS = frozenset(
    _PREFIX + name for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge")
)
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_BROKEN: Any = object()


class Document(NamedTuple, Generic[T]):
    """What was read. Broken and missing values are blank: defaults, "", empty containers.

    Attributes:
        value: The struct; None if the text is no YAML mapping at all.
        problems: All mistakes in the text.
        lines: The line of every place that is in the text, from 1.
    """

    value: T | None
    problems: list[Problem]
    lines: dict[Where, int]

    def line(self, where: Where) -> int:
        """The line of a place, or of the closest part around it that is in the text."""
        return next((self.lines[where[:end]] for end in range(len(where), -1, -1) if where[:end] in self.lines), 1)


def top_level_value(text: str, key: str) -> str | None:
    """Return the text of a scalar under a key of the outermost mapping; None where there is none, or no YAML."""
    try:
        node = _Composer(text).get_single_node()
    except yaml.YAMLError:
        return None
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(name, yaml.ScalarNode) and name.value == key and isinstance(value, yaml.ScalarNode):
            return str(value.value)
    return None


def read_yaml(
    text: str, kind: type[T], rewrite: Rewrite = lambda _, node: node, *, ignored: tuple[str, ...] = ()
) -> Document[T]:
    """Read `text` as a `kind`. Fields whose type is a Path are not the text's to set.

    Args:
        text: The YAML text.
        kind: The struct to read.
        rewrite: See `Rewrite`.
        ignored: Keys of the outermost mapping that are no fields.
    """
    try:
        node = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        return Document(None, [Problem((), f"is no YAML: {message}")], {(): mark.line + 1 if mark else 1})
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(None, [Problem((), f"is no YAML: {error.reason}: {error.character!r}")], {(): line})
    if node is None:
        return Document(None, [Problem((), "is empty")], {})
    if isinstance(node, yaml.MappingNode):
        node.value = [(name, value) for name, value in node.value if name.value not in ignored]
    reader = _Reader(rewrite)
    value = reader.read(node, kind, ())
    return Document(None if value is _BROKEN else value, reader.problems, reader.lines)


class _Composer(yaml.SafeLoader):
    """Composes nodes, each with its line, and constructs no objects."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(
                None, None, "anchors (&) and aliases (*) are not used here; write it out", event.start_mark
            )
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deep", event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Reader:
    """Walks nodes and types together."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.problems: list[Problem] = []
        self.lines: dict[Where, int] = {}
        self._rewrite = rewrite

    def read(self, node: yaml.Node, kind: Any, where: Where) -> Any:
        """Return the node's value as a `kind`, or _BROKEN after recording the problem."""
        self.lines.setdefault(where, node.start_mark.line + 1)
        if node.tag not in _TAGS:
            return self._problem(where, f"the tag {node.tag.removeprefix(_PREFIX)} is not used here; leave it out")
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        options = tuple(map(without_bounds, options))
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_PREFIX}null" and NoneType in options:
            return None
        for option in options:
            full = self._rewrite(option, node)
            if reader := self._reader_for(full, option):
                return reader(full, option, where)
        expected = " or ".join(_describe(option) for option in options if option is not NoneType)
        return self._problem(where, f"is {_found(node)}; expected {expected}")

    def _reader_for(self, node: yaml.Node, kind: Any) -> Callable[[Any, Any, Where], Any] | None:
        origin = get_origin(kind)
        if isinstance(node, yaml.MappingNode):
            if origin is dict:
                return self._read_dict
            return self._read_struct if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None
        if isinstance(node, yaml.SequenceNode):
            return self._read_tuple if origin is tuple else None
        if node.tag == f"{_PREFIX}null":
            return None
        if origin is Literal:
            return self._read_word
        readers = {str: self._read_text, int: self._read_number, float: self._read_number, bool: self._read_switch}
        return readers.get(kind)

    def _read_text(self, node: yaml.ScalarNode, kind: type[str], where: Where) -> Any:
        if not node.value:
            return self._problem(where, "is empty")
        if "\0" in node.value:
            return self._problem(where, "has a NUL character")
        return kind(node.value)

    def _read_number(self, node: yaml.ScalarNode, kind: Any, where: Where) -> Any:
        whole = kind is int
        text = _SPECIAL_FLOATS.get(str(node.value).lower(), str(node.value))
        try:
            if node.style is None and len(text) <= 40 and not (whole and not re.fullmatch(r"[+-]?[0-9][0-9_]*", text)):
                return kind(text)
        except ValueError:
            pass
        return self._problem(where, f"is {_found(node)}; expected {_WORDS[kind]}")

    def _read_switch(self, node: yaml.ScalarNode, kind: type[bool], where: Where) -> Any:
        if node.tag == f"{_PREFIX}bool":
            return yaml.SafeLoader.bool_values[node.value.lower()]
        return self._problem(where, f"is {_found(node)}; expected {_WORDS[kind]}")

    def _read_word(self, node: yaml.ScalarNode, kind: Any, where: Where) -> Any:
        known = get_args(kind)
        if node.value in known:
            return node.value
        return self._problem(where, f"unknown value {node.value[:80]!r}; {did_you_mean(node.value, known)}")

    def _read_tuple(self, node: yaml.SequenceNode, kind: Any, where: Where) -> Any:
        item, _ = get_args(kind)
        return tuple(self._or_blank(child, item, (*where, index)) for index, child in enumerate(node.value))

    def _read_dict(self, node: yaml.MappingNode, kind: Any, where: Where) -> Any:
        _, item = get_args(kind)
        return {key: self._or_blank(child, item, (*where, key)) for key, child in self._entries(node, where).items()}

    def _read_struct(self, node: yaml.MappingNode, kind: type[msgspec.Struct], where: Where) -> Any:
        fields = {field.name: field for field in msgspec.structs.fields(kind) if field.type is not Path}
        values = {}
        for key, child in self._entries(node, where).items():
            if key not in fields:
                self._problem((*where, key), f"unknown key; {did_you_mean(key, fields)}")
                continue
            value = self.read(child, fields[key].type, (*where, key))
            if value is not _BROKEN:
                values[key] = value
        for name, field in fields.items():
            if field.required and name not in values:
                values[name] = _blank(field.type)
                if (*where, name) not in self.lines:
                    self._problem((*where, name), f"is missing; expected {_describe(field.type)}")
        return kind(**values)

    def _entries(self, node: yaml.MappingNode, where: Where) -> Mapping[str, yaml.Node]:
        entries: dict[str, yaml.Node] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                self.problems.append(Problem(where, f"line {line} has a key that is no text"))
            elif key.value in entries:
                self.problems.append(Problem((*where, key.value), f"is there twice, again in line {line}"))
            else:
                entries[key.value] = child
                self.lines[*where, key.value] = line
        return entries

    def _or_blank(self, node: yaml.Node, kind: Any, where: Where) -> Any:
        value = self.read(node, kind, where)
        return _blank(kind) if value is _BROKEN else value

    def _problem(self, where: Where, message: str) -> Any:
        self.problems.append(Problem(where, message))
        return _BROKEN


def _blank(kind: Any) -> Any:
    kind = without_bounds(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        required = (field for field in msgspec.structs.fields(kind) if field.required)
        return kind(**{field.name: _blank(field.type) for field in required})
    return {str: "", float: 1.0, int: 1, bool: False}.get(kind) if get_origin(kind) is None else get_origin(kind)()


def _describe(kind: Any) -> str:
    kind = without_bounds(kind)
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(get_args(kind))
    if origin is tuple:
        return "a list"
    if origin is dict:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        keys = (field.name for field in msgspec.structs.fields(kind) if field.type is not Path)
        return f"a mapping with the keys {', '.join(keys)}"
    return _WORDS[kind]


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "empty" if not node.value else repr(node.value[:80])
