"""A Jinja environment for templates that anybody may have written: bounded in time, in memory and in output.

Jinja's sandbox keeps a template from Python's objects, and not from work without end. Here, every value that a template
makes is measured before it is made or right after, where its size is known to be near that of its parts; loops, macros
and calls look at the clock. What no operation can make larger than `Budget` allows, no later operation needs long for.
"""

from __future__ import annotations

import json
import re
import time
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 2.0
"""Longest time that a rendering may take."""
VALUE = 1 << 20
"""Largest value that is made beside the messages, in characters and elements."""
TOTAL = 1 << 25
"""Characters and elements of all values that a rendering makes beside copies of the messages."""
_COPIES = 50
"""Number of times that the messages may be copied."""
_BITS = 4096
"""Largest whole number, in bits."""
_WIDTH = 1000
"""Largest width or precision in a format."""
_FIXED = 16
"""What a value costs beside its characters and elements."""

_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4,})|\{[^{}]*:[^{}]*(\{|\d{4,})")
_FILTERS = frozenset(
    {
        *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
        *("float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map"),
        *("max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice"),
        *("sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount"),
    }
)
_STRING_METHODS = frozenset(
    {
        *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "join", "ljust", "lower"),
        *("lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace"),
        *("istitle", "isupper"),
    }
)


class TemplateLimitError(jinja2.TemplateError):
    """A template does more than a template may."""


class Budget:
    """What is left for a rendering.

    Args:
        given: Size of the variables, in characters and elements.
    """

    def __init__(self, given: int) -> None:
        self._deadline = time.monotonic() + SECONDS
        self.value = VALUE + 4 * given
        self._left = TOTAL + _COPIES * given

    def tick(self, size: int = 0) -> None:
        """Count a step, and the characters that it writes."""
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")
        self.take(size + _FIXED)

    def take(self, size: int) -> None:
        """Count a value that is made."""
        self._left -= size
        if size > self.value or self._left < 0:
            raise TemplateLimitError("it makes texts or lists that are too large")

    def measure(self, value: Any) -> int:
        """Return the size of a value, all that it holds included, each as often as it is held."""
        total, pending = 0, [value]
        while pending:
            each = pending.pop()
            total += 1
            if isinstance(each, str | bytes):
                total += len(each)
            elif isinstance(each, dict):
                pending += [*each.keys(), *each.values()]
            elif isinstance(each, list | tuple | set | frozenset):
                pending += each
            if total > self.value:
                raise TemplateLimitError("it makes texts or lists that are too large")
        return total

    def check(self, size: int) -> None:
        """Refuse a value of this size before it is made."""
        if size > self.value:
            raise TemplateLimitError("it makes texts or lists that are too large")

    def made(self, value: Any) -> Any:
        """Count a value that was made, and return it."""
        if isinstance(value, str):
            self.take(len(value) + _FIXED)
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.take(self.measure(value) + _FIXED)
        else:
            self.tick()
        return value


_BUDGET: ContextVar[Budget] = ContextVar("budget")


class _Counted(Extension):
    """What the compiled template calls, under names that no template can replace."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

    def parse(self, parser: Any) -> Any:
        """`{% generation %}` marks the assistant's turns for training; it has no effect here."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tick(self, size: int) -> str:
        _BUDGET.get().tick(size)
        return ""

    def made(self, value: Any) -> Any:
        return _BUDGET.get().made(value)

    def concatenate(self, *parts: Any) -> str:
        budget = _BUDGET.get()
        budget.check(sum(budget.measure(part) for part in parts))
        return str(budget.made("".join(map(str, parts))))

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return _BUDGET.get().made(value[slice(start, stop, step)])


class _Counting(NodeTransformer):
    """Adds the calls of `_Counted` to a parsed template."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._counted = environment.extensions[_Counted.identifier]

    def _call(self, name: str, *arguments: nodes.Expr) -> nodes.Call:
        return self._counted.call_method(name, [*arguments])

    def _count_body(self, node: Any) -> Any:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", nodes.Const(written))))
        return node

    visit_For = visit_Macro = visit_CallBlock = _count_body  # noqa: N815 - names of Jinja's visitor
    visit_Block = visit_AssignBlock = visit_FilterBlock = _count_body  # noqa: N815

    def _count_value(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("made", node)

    visit_List = visit_Dict = visit_Tuple = _count_value  # noqa: N815

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return self._call("concatenate", *node.nodes)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = (node.arg.start, node.arg.stop, node.arg.step)
        return self._call("cut", node.node, *(nodes.Const(None) if part is None else part for part in parts))


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates use it, every operation of which is counted."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Counted, "jinja2.ext.loopcontrols"],
            autoescape=False,
            optimized=False,  # constants are not computed before they are counted
            finalize=_written,
        )
        self.filters = {name: _counted_filter(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = _to_json
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}

    def template(self, source: str) -> jinja2.Template:
        """Compile a template."""
        tree = _Counting(self).visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        budget.tick()
        if operator == "**" and not _small_power(left, right):
            raise TemplateLimitError("it computes numbers that are too large")
        if operator == "*":
            sizes = [each for each in (left, right) if isinstance(each, str | list | tuple)]
            counts = [each for each in (left, right) if isinstance(each, int)]
            if sizes and counts:
                budget.check(budget.measure(sizes[0]) * max(1, counts[0]))
            elif len(counts) == 2 and left.bit_length() + right.bit_length() > _BITS:
                raise TemplateLimitError("it computes numbers that are too large")
        elif operator == "+" and isinstance(left, str | list | tuple):
            budget.check(budget.measure(left) + budget.measure(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(budget, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        budget = _BUDGET.get()
        budget.tick()
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            args = _check_string_call(budget, owner, name, args, kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))


def render(template: jinja2.Template, variables: dict[str, Any], longest: int) -> str:
    """Render a template of a `Sandbox`.

    Args:
        template: From `Sandbox.template`.
        variables: Of plain types: texts, numbers, lists and mappings.
        longest: Most characters of the text.

    Raises:
        TemplateLimitError: It takes too long, or needs too much memory.
        Exception: Whatever the template raises.
    """
    given = _given(variables)
    token, parts, length = _BUDGET.set(Budget(given)), [], 0
    try:
        for part in template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > longest:
                raise TemplateLimitError(f"its text has more than {longest:,} characters")
    finally:
        _BUDGET.reset(token)
    return "".join(parts)


def _given(value: Any) -> int:
    """Return the size of what a program gives, which it holds anyway."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, dict):
        return 1 + sum(_given(key) + _given(item) for key, item in value.items())
    return 1 + sum(map(_given, value)) if isinstance(value, list | tuple) else 1


def _written(value: Any) -> Any:
    """Count what is written to the output, or to a variable."""
    budget = _BUDGET.get()
    budget.take(budget.measure(value))
    return value


def _small_power(base: Any, exponent: Any) -> bool:
    if not (isinstance(base, int) and isinstance(exponent, int)):
        return isinstance(base, int | float) and isinstance(exponent, int | float)
    return abs(exponent) * max(1, base.bit_length()) <= _BITS


def _check_format(budget: Budget, text: str, values: Any) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateLimitError(f"a format is wider than {_WIDTH}")
    budget.check(len(text) + (text.count("%") + text.count("{")) * budget.measure(values))


def _check_number(value: Any, most: int = _WIDTH) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise TemplateLimitError(f"a width is more than {most}")


def _check_string_call(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Check a call of a text's method before it is made, and return its arguments."""
    if name not in _STRING_METHODS:
        raise TemplateLimitError(f"it calls {name} of a text")
    if name == "format":
        _check_format(budget, text, [*args, *kwargs.values()])
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        args = (_listed(budget, args[0]),)
        budget.check(budget.measure(args[0]) + len(text) * len(args[0]))
    elif name in ("center", "ljust", "rjust", "zfill"):
        for each in args:
            _check_number(each)
    return args


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    budget.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _listed(budget: Budget, values: Any) -> list[Any]:
    found = []
    for each in values:
        found.append(each)
        budget.tick()
    return found


def _counted_filter(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose arguments and results are counted."""
    # jinja2 marks filters that take the context or the environment first.
    leading = 1 if hasattr(implementation, "jinja_pass_arg") else 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget, value, options = _BUDGET.get(), args[leading], [*args[leading + 1 :], *kwargs.values()]
        budget.tick()
        if name in ("center", "indent", "batch", "slice", "round"):
            for each in options:
                _check_number(each, 100 if name in ("round", "indent") else _WIDTH)
        if name == "indent":
            text = str(value)
            budget.check(len(text) + 100 * (text.count("\n") + 1))
        elif name == "format":
            _check_format(budget, str(value), options)
        elif name == "replace" and len(options) >= 2:
            _check_replace(budget, value, options[0], options[1])
        elif name in ("string", "e", "escape", "join", "lower", "upper", "title", "capitalize", "trim", "center"):
            value = _listed(budget, value) if name == "join" and not isinstance(value, str) else value
            separators = sum(len(each) for each in options if isinstance(each, str)) if name == "join" else 0
            budget.check(budget.measure(value) * (1 + separators))
        elif name == "sum" and not all(isinstance(each, int | float | str) for each in options):
            raise TemplateLimitError("it adds up lists")
        return budget.made(implementation(*args[:leading], value, *args[leading + 1 :], **kwargs))

    counted.__dict__.update(getattr(implementation, "__dict__", {}))
    return _bounded(counted) if name in ("map", "select", "reject", "selectattr", "rejectattr") else counted


def _bounded(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose lazily made results are counted as they are taken."""

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for each in implementation(*args, **kwargs):
            _BUDGET.get().tick()
            yield each

    counted.__dict__.update(getattr(implementation, "__dict__", {}))
    return counted


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    budget = _BUDGET.get()
    _check_number(indent, 16)
    long = [each for each in (indent, *(separators or ())) if isinstance(each, str) and len(each) > 16]
    if long:
        raise TemplateLimitError("a separator of JSON is too long")
    budget.check(budget.measure(value))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.take(len(text))
    return text


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(text: str) -> str:
    if len(text) > _WIDTH or re.search(r"%[^a-zA-Z%]*\d{3,}", text):
        raise TemplateLimitError("a format of time is too long")
    return datetime.now().strftime(text)  # noqa: DTZ005 - local time, as transformers has it
