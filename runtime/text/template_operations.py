"""Filters, tests and methods that a chat template may use, each checked before it makes a value."""

from __future__ import annotations

import json
import re
from datetime import datetime
from string import Formatter
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.filters import do_join, make_attrgetter

from edgemix.runtime.text.template_budget import BITS, BUDGET, Budget, TemplateLimitError
from edgemix.runtime.text.template_marks import call_method, unmarked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WIDTH = 1000
"""Largest width or precision in a format."""
_NUMBER = 400
"""Most characters of a number that a format writes, beside its width."""
_PRODUCT = 1 << 27
"""Most comparisons of two characters."""
_WIDE_PERCENT = re.compile(r"%(\([^()]*\))?[^a-zA-Z%(]*(\*|\d{4,})|%\([^()]*\(")
_WIDE_FIELD = re.compile(r"\{|\d{4,}")
_WRITING = frozenset(
    {
        *("capitalize", "center", "e", "escape", "format", "indent", "lower", "replace", "safe", "string", "title"),
        *("trim", "truncate", "upper", "wordcount"),
    }
)
"""Filters that make text of any value."""
_QUADRATIC = frozenset({"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"})
"""Methods that may compare each character of a text with each of an argument."""
_COMPARING = frozenset({"==", "!=", "eq", "equalto", "ne", "in", "<", "<=", ">", ">=", "lt", "le", "gt", "ge"}) | {
    *("lessthan", "greaterthan")
}
"""Tests that compare values."""
FILTERS = frozenset(
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


def small_power(base: Any, exponent: Any) -> bool:
    if not (isinstance(base, int) and isinstance(exponent, int)):
        return isinstance(base, int | float) and isinstance(exponent, int | float)
    return abs(exponent) * max(1, base.bit_length()) <= BITS


def check_percent_format(budget: Budget, text: str, values: Any) -> None:
    """Check a text before its formats, such as `%5d`, are replaced by values."""
    if _WIDE_PERCENT.search(text):
        raise TemplateLimitError(f"a format is wider than {_WIDTH}")
    _check_fields(budget, text, text.count("%"), values)


def _check_brace_format(budget: Budget, text: str, values: Any) -> None:
    """Check a text before its formats, such as `{:5d}`, are replaced by values."""
    fields = 0
    for _, name, width, _ in Formatter().parse(text):
        fields += 1
        if name and any(each in name for each in ".["):
            raise TemplateLimitError("a format reads what is inside of a value")
        if width and _WIDE_FIELD.search(width):
            raise TemplateLimitError(f"a format is wider than {_WIDTH}")
    _check_fields(budget, text, fields, values)


def _check_fields(budget: Budget, text: str, fields: int, values: Any) -> None:
    widest = max(map(int, re.findall(r"(?<!\d)\d{1,3}(?!\d)", text)), default=0)
    budget.check(len(text) + fields * (budget.measure(values, written=True) + widest + _NUMBER))


def _check_number(value: Any, most: int = _WIDTH) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise TemplateLimitError(f"a width is more than {most}")


def check_string_call(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Check a call of a text's method before it is made, and return its arguments."""
    if name not in _STRING_METHODS:
        raise TemplateLimitError(f"it calls {name} of a text")
    if name == "format":
        _check_brace_format(budget, text, [*args, *kwargs.values()])
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        args = (_listed(budget, args[0]),)
        budget.check(budget.measure(args[0], written=True) + len(text) * len(args[0]))
    elif name in _QUADRATIC:
        _check_product(text, [*args, *kwargs.values()])
    elif name in ("center", "ljust", "rjust", "zfill"):
        for each in args:
            _check_number(each)
    return args


def _check_product(text: Any, options: list[Any]) -> None:
    if isinstance(text, str) and any(len(text) * len(each) > _PRODUCT for each in options if isinstance(each, str)):
        raise TemplateLimitError("it compares texts that are too long")


def _check_replace(budget: Budget, s: Any, old: Any, new: Any) -> None:
    text, old, new = str(s), str(old), str(new)
    budget.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


@jinja2.pass_eval_context
def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    """Jinja's filter, with the texts measured as they are joined: they may stand in attributes."""
    budget = BUDGET.get()
    if attribute is not None:
        get = make_attrgetter(context.environment, attribute)
        value = (get(each) for each in value)
    value = value if isinstance(value, str) else _listed(budget, value)
    budget.check(budget.measure(value, written=True) + len(value) * budget.measure(d, written=True))
    return do_join(context, value, d)


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _listed(budget: Budget, values: Any) -> list[Any]:
    found = []
    for each in values:
        found.append(each)
        budget.tick()
    return found


def counted_filter(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose arguments and results are counted."""
    # jinja2 marks filters that take the context or the environment first.
    leading = 1 if hasattr(implementation, "jinja_pass_arg") else 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget, value, options = BUDGET.get(), args[leading], [*args[leading + 1 :], *kwargs.values()]
        budget.tick()
        if name in _WRITING:
            budget.measure([value, *options], written=True)
        if name in ("center", "indent", "batch", "slice", "round"):
            for each in options:
                _check_number(each, 100 if name in ("round", "indent") else _WIDTH)
                if name == "indent" and isinstance(each, str):
                    _check_number(len(each), 100)
        if name == "indent":
            text = str(value)
            budget.check(len(text) + 100 * (text.count("\n") + 1))
        elif name == "format":
            check_percent_format(budget, str(value), options)
        elif name == "replace":
            _check_replace(budget, *args[leading : leading + 3], **_without(kwargs, "count"))
        elif name == "trim":
            _check_product(value, options)
        elif name == "sum" and not all(isinstance(each, int | float | str) for each in options):
            raise TemplateLimitError("it adds up lists")
        if budget.marks and name in ("replace", "trim"):
            method = "strip" if name == "trim" else name
            named = (kwargs[each] for each in ("chars", "old", "new", "count") if each in kwargs)
            given = tuple(each for each in (*args[leading + 1 :], *named) if each is not None)
            return budget.made(call_method(str(value), method, given, {}, budget.marks))
        return budget.made(implementation(*args[:leading], value, *args[leading + 1 :], **kwargs))

    counted.__dict__.update(getattr(implementation, "__dict__", {}))
    return _bounded(counted) if name in ("map", "select", "reject", "selectattr", "rejectattr") else counted


def _bounded(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose lazily made results are counted as they are taken."""

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for each in implementation(*args, **kwargs):
            BUDGET.get().tick()
            yield each

    counted.__dict__.update(getattr(implementation, "__dict__", {}))
    return counted


def counted_test(name: str, implementation: Any) -> Callable[..., Any]:
    """Return a test whose calls are counted: filters may make many."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.tick()
        if name in _COMPARING:
            args = unmarked(args, budget.marks)
        return implementation(*args, **kwargs)

    counted.__dict__.update(getattr(implementation, "__dict__", {}))
    return counted


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    budget = BUDGET.get()
    _check_number(indent, 16)
    long = [each for each in (indent, *(separators or ())) if isinstance(each, str) and len(each) > 16]
    if long:
        raise TemplateLimitError("a separator of JSON is too long")
    budget.check(budget.measure(value))
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None:
        return str(budget.made(json.dumps(value, **options)))
    parts, length = [], 0
    for part in json.JSONEncoder(indent=indent, **options).iterencode(value):  # as deep as it is, as wide is a line
        length += len(part)
        budget.check(length)
        parts.append(part)
    return str(budget.made("".join(parts)))


def refuse(message: Any) -> None:
    BUDGET.get().measure(message, written=True)
    raise jinja2.TemplateError(str(message))


def strftime_now(text: str) -> str:
    if len(text) > _WIDTH or re.search(r"%[^a-zA-Z%]*\d{3,}", text):
        raise TemplateLimitError("a format of time is too long")
    return datetime.now().strftime(text)  # noqa: DTZ005 - local time, as transformers has it
