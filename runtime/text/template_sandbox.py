"""A Jinja environment for templates that anybody may have written: bounded in time, in memory and in output.

Jinja's sandbox keeps a template from Python's objects, and not from work without end. Here, every value that a
template makes is measured before it is made or right after, where its size is known to be near that of its parts; so is
every value that it reaches inside of another one or passes on, and only plain values become text. Loops, macros and
calls look at the clock. What no operation can make larger than `Budget` allows, no later operation needs long for.
"""

from __future__ import annotations

from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgemix.runtime.text import template_operations as operations
from edgemix.runtime.text.template_budget import BITS, BUDGET, Budget, TemplateLimitError
from edgemix.runtime.text.template_marks import call_method, unmarked

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_NODES = 1 << 14
"""Most parts of a template, as Jinja counts them: what is compiled takes time and memory, too."""


class _Counted(Extension):
    """What the compiled template calls, under names that no template can replace."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

    def parse(self, parser: Any) -> Any:
        """`{% generation %}` marks the assistant's turns for training; it has no effect here."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tick(self) -> str:
        BUDGET.get().tick()
        return ""

    def made(self, value: Any) -> Any:
        return BUDGET.get().made(value)

    def take(self, size: int) -> str:
        BUDGET.get().take(size)
        return ""

    def compared(self, value: Any) -> Any:
        return unmarked(value, BUDGET.get().marks)

    def concatenate(self, *parts: Any) -> str:
        budget = BUDGET.get()
        budget.measure(parts, written=True)
        return str(budget.made("".join(map(str, parts))))

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return BUDGET.get().made(value[slice(start, stop, step)])


class _Counting(NodeTransformer):
    """Adds the calls of `_Counted` to a parsed template."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._counted = environment.extensions[_Counted.identifier]

    def _call(self, name: str, *arguments: nodes.Expr) -> nodes.Call:
        return self._counted.call_method(name, [*arguments])

    def _count_body(self, node: Any) -> Any:
        self._count_literals(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick")))
        return node

    def _count_literals(self, node: Any) -> Any:
        """Count the template's own text where it is written: at the beginning of each branch, loop or macro."""
        branches = [branch for branch in (node.body, getattr(node, "else_", [])) if _written_length(branch)]
        lengths = [_written_length(branch) for branch in branches]
        self.generic_visit(node)
        for branch, length in zip(branches, lengths, strict=True):
            branch.insert(0, nodes.ExprStmt(self._call("take", nodes.Const(length))))
        return node

    visit_If = _count_literals  # noqa: N815 - names of Jinja's visitor
    visit_For = visit_Macro = visit_CallBlock = _count_body  # noqa: N815 - names of Jinja's visitor
    visit_Block = visit_AssignBlock = visit_FilterBlock = _count_body  # noqa: N815

    def _count_value(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("made", node)

    visit_List = visit_Dict = visit_Tuple = _count_value  # noqa: N815

    def visit_Compare(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        if not all(isinstance(each.expr, nodes.Const) and not isinstance(each.expr.value, str) for each in node.ops):
            for each in (node, *node.ops):
                each.expr = self._compared(each.expr)
        return self._call("made", node)

    def _compared(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else self._call("compared", node)

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return self._call("concatenate", *node.nodes)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = (node.arg.start, node.arg.stop, node.arg.step)
        return self._call("cut", node.node, *(nodes.Const(None) if part is None else part for part in parts))


_PASSED = frozenset({"_loop_vars", "_block_vars"})
"""What Jinja passes with calls inside of loops and blocks: their variables, which no function gets."""
_BRANCHES = (nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block, nodes.AssignBlock, nodes.FilterBlock)


def _written_length(body: list[nodes.Node]) -> int:
    """Return the number of characters of the template's own text that a body writes outside of its branches."""
    length, pending = 0, [*body]
    while pending:
        node = pending.pop()
        if isinstance(node, nodes.TemplateData):
            length += len(node.data)
        elif not isinstance(node, _BRANCHES):
            pending += node.iter_child_nodes()
    return length


def _parts(node: nodes.Node) -> int:
    """Return the parts that a node counts as: those that become functions cost more."""
    if isinstance(node, nodes.Macro | nodes.CallBlock | nodes.Block | nodes.FilterBlock):
        return 16
    return 8 if isinstance(node, nodes.For) else 1


class _Namespace(Namespace):
    """A namespace that debuggers and logs do not write with all that it holds: one may hold others many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


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
        filters = {**self.filters, "join": operations.join}
        self.filters = {name: operations.counted_filter(name, filters[name]) for name in operations.FILTERS}
        self.filters["tojson"] = operations.to_json
        self.tests = {name: operations.counted_test(name, test) for name, test in self.tests.items()}
        for name in ("lipsum", "cycler"):
            self.globals.pop(name)
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": operations.refuse,
            "strftime_now": operations.strftime_now,
        }

    def template(self, source: str) -> jinja2.Template:
        """Compile a template."""
        parsed = self.parse(source)
        parts = (each for node in parsed.find_all(nodes.Node) for each in repeat(node, _parts(node)))
        if next(islice(parts, MAX_NODES, None), None) is not None:
            raise TemplateLimitError(f"it has more than {MAX_NODES:,} parts")
        tree = _Counting(self).visit(parsed)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        budget.tick()
        if operator == "**" and not operations.small_power(left, right):
            raise TemplateLimitError("it computes numbers that are too large")
        if operator == "*":
            sizes = [each for each in (left, right) if isinstance(each, str | list | tuple)]
            counts = [each for each in (left, right) if isinstance(each, int)]
            if sizes and counts:
                budget.check(budget.measure(sizes[0]) * max(1, counts[0]))
            elif len(counts) == 2 and left.bit_length() + right.bit_length() > BITS:
                raise TemplateLimitError("it computes numbers that are too large")
        elif operator == "+" and isinstance(left, str | list | tuple):
            budget.check(budget.measure(left) + budget.measure(right))
        elif operator == "%" and isinstance(left, str):
            operations.check_percent_format(budget, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return BUDGET.get().reached(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return BUDGET.get().reached(super().getitem(obj, argument))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        budget = BUDGET.get()
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, _Counted):
            return method(*args)
        budget.tick()
        given = {key: value for key, value in kwargs.items() if key not in _PASSED}
        budget.measure([args, given])
        if isinstance(owner, str):
            args = operations.check_string_call(budget, owner, name, args, given)
            if budget.marks:
                return budget.made(call_method(owner, name, args, given, budget.marks))
        elif isinstance(owner, int | float | complex | bytes | type):
            raise TemplateLimitError(f"it calls {name} of a number or a type")
        return budget.made(super().call(__context, __obj, *args, **kwargs))


def render(template: jinja2.Template, variables: dict[str, Any], longest: int, marks: Mapping[int, str]) -> str:
    """Render a template of a `Sandbox`.

    Args:
        template: From `Sandbox.template`.
        variables: Of plain types: texts, numbers, lists and mappings.
        longest: Most characters of the text.
        marks: What characters of the variables stand for where the template asks what they hold.

    Raises:
        TemplateLimitError: It takes too long, or needs too much memory.
        Exception: Whatever the template raises.
    """
    token, parts, length = BUDGET.set(Budget(variables, marks)), [], 0
    try:
        for part in template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > longest:
                raise TemplateLimitError(f"its text has more than {longest:,} characters")
    finally:
        BUDGET.reset(token)
    return "".join(parts)


def _written(value: Any) -> Any:
    """Count what is written to the output, or to a variable."""
    budget = BUDGET.get()
    budget.take(budget.measure(value, written=True))
    return value
