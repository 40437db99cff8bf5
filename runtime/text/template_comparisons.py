"""The texts with which a chat template compares others, and does not write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

_METHODS = frozenset(
    {
        *("count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix", "rfind"),
        *("rindex", "rpartition", "rsplit", "rstrip", "split", "startswith", "strip"),
    }
)
_PLAIN = (nodes.Const, nodes.List, nodes.Tuple)
_FILTERS = frozenset({"trim", "select", "reject", "selectattr", "rejectattr"})


def compared_texts(tree: nodes.Template) -> Iterator[nodes.Const]:
    """Yield the constants with which a parsed template compares texts."""
    for expression in _compared(tree):
        each = [expression, *expression.find_all(nodes.Const)] if isinstance(expression, _PLAIN) else []
        for constant in each:
            if isinstance(constant, nodes.Const) and isinstance(constant.value, str):
                yield constant


def _compared(tree: nodes.Template) -> Iterator[nodes.Node]:
    for compare in tree.find_all(nodes.Compare):
        yield compare.expr
        yield from (operand.expr for operand in compare.ops)
    for test in tree.find_all(nodes.Test):
        yield from (test.node, *(test.args or ()))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            if call.node.attr in _METHODS:
                yield from (*call.args, *(option.value for option in call.kwargs))
            elif call.node.attr == "replace":
                yield from call.args[:1]
    for each in tree.find_all(nodes.Filter):
        if each.name in _FILTERS:
            yield from each.args or ()
        elif each.name == "replace":
            yield from (each.args or ())[:1]
