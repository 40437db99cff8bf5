"""Chat templates from a grammar of what Jinja can be made to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from values import TEXTS, mutated_bytes

if TYPE_CHECKING:
    from random import Random

SOUND = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_NUMBERS = ("0", "1", "-1", "7", "10**6", "10**8", "10**10", "2**63", "10**100", "1.5", "1e308", "1/0")
_NAMES = (
    "messages",
    "messages[0]",
    "messages[0].content",
    "messages[-1]['role']",
    "bos_token",
    "eos_token",
    "tools",
    "x",
    "self",
    "loop",
    "loop.index",
    "caller",
    "namespace(a=1)",
    "cycler(1, 2)",
    "joiner()",
    "undefined_name",
    "true",
    "none",
    "''",
    "'ab'",
    "'a' * 9999",
    "[1, 2]",
    "(1,)",
    "{'a': 1}",
    "dict(a=1)",
    "range(10)",
    "lipsum(1)",
    "lipsum(n=10**6)",
    "range(10**9)",
    "messages.__class__",
    "''.__class__.__mro__",
    "x.y.z",
    "messages[0].content.format",
    "'%s' % x",
    "'%9999999s' % 1",
    "'{0.__class__}'.format(1)",
    "'{:>99999999}'.format(1)",
    "'a'.center(10**9)",
    "'a'.zfill(10**9)",
    "'\\ud800'",
    "'a'.encode()",
    "strftime_now('%Y')",
    "strftime_now('%9999999d')",
    "raise_exception('no')",
    "raise_exception()",
)
_FILTERS = (
    "upper",
    "list",
    "length",
    "tojson",
    "tojson(indent=10**9)",
    "join",
    "join('a' * 9999)",
    "string",
    "int",
    "float",
    "sort",
    "unique",
    "batch(10**9, 0)",
    "slice(10**9)",
    "indent(10**9)",
    "center(10**9)",
    "wordwrap(1)",
    "wordwrap(0)",
    "replace('', 'aaaaaaaaaa')",
    "format(1)",
    "pprint",
    "map('upper')",
    "map(attribute='x')",
    "select",
    "groupby('x')",
    "sum",
    "random",
    "reverse",
    "first",
    "last",
    "trim",
    "urlize",
    "xmlattr",
    "escape",
    "safe",
    "dictsort",
    "items",
    "attr('__class__')",
    "filesizeformat",
    "truncate(-1)",
    "round(10**9)",
    "default('x')",
    "nothing",
)
_DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "in", "not in", "==", "<", "is")


def template(rng: Random, data: bytes) -> bytes:
    """Return a template: most are bombs, some a sound one with damage."""
    if rng.randrange(5) == 0:
        return mutated_bytes(rng, data)
    text = "".join(_statement(rng, 0) for _ in range(rng.choice((1, 2, 4))))
    if rng.randrange(4) == 0:
        text = data.decode() + text
    if rng.randrange(20) == 0:
        text = rng.choice(
            (
                "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
                "{% if 1 %}" * 500 + "{% endif %}" * 500,
                "{{ 1 " + "+ 1" * 20_000 + " }}",
                "{{ x" + "|upper" * 3_000 + " }}",
                "{{ '" + "a" * 2_000_000 + "' }}",
                "{{ x" + ".a" * 20_000 + " }}",
                "{{ [" * 2_000,
                "{% raw %}",
                "{#" * 99_999,
                "{{ -" + "-" * 9_999 + "1 }}",
            )
        )
    return text.encode("utf-8", "surrogatepass")


def _statement(rng: Random, depth: int) -> str:
    if depth > 4:
        return f"{{{{ {_expression(rng, 0)} }}}}"
    body = "".join(_statement(rng, depth + 1) for _ in range(rng.choice((1, 1, 2))))
    value = _expression(rng, 0)
    return rng.choice(
        (
            f"{{{{ {value} }}}}",
            f"{{{{ {value} }}}}{body}",
            f"{{% for x in {value} %}}{body}{{% endfor %}}",
            f"{{% for x in range({rng.choice(_NUMBERS)}) %}}{body}{{% endfor %}}",
            f"{{% for x in [{value}] recursive %}}{body}{{{{ loop([x]) }}}}{{% endfor %}}",
            f"{{% if {value} %}}{body}{{% endif %}}",
            f"{{% set x = {value} %}}{body}",
            f"{_DOUBLING}{body}",
            f"{{% set x %}}{body}{{% endset %}}{{{{ x }}}}",
            f"{{% macro m(x) %}}{body}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m(1) }}}}",
            f"{{% macro m(x) %}}{body}{{{{ caller() }}}}{{% endmacro %}}{{% call m(1) %}}{body}{{% endcall %}}",
            f"{{% filter {rng.choice(_FILTERS)} %}}{body}{{% endfilter %}}",
            f"{{% with x = {value} %}}{body}{{% endwith %}}",
            f"{{% {rng.choice(('include', 'import', 'extends'))} {value} %}}",
            f"{{% {rng.choice(('break', 'continue', 'do x', 'generation', 'endfor', 'block a', 'debug'))} %}}{body}",
            rng.choice(TEXTS),
        )
    )


def _expression(rng: Random, depth: int) -> str:
    if depth > 3 or rng.random() < 0.3:
        return rng.choice((rng.choice(_NAMES), rng.choice(_NUMBERS)))
    one, other = _expression(rng, depth + 1), _expression(rng, depth + 1)
    return rng.choice(
        (
            f"({one} {rng.choice(_OPERATORS)} {other})",
            f"({one})|{rng.choice(_FILTERS)}",
            f"({one})[{other}]",
            f"({one})[{other}:]",
            f"({one} if {other} else 1)",
            f"[{one}, {other}]",
            f"({one})({other})",
            f"({one}).{rng.choice(('split', 'join', 'append', 'items', 'x', '__init__', 'format_map'))}({other})",
            f"({one}) is {rng.choice(('defined', 'string', 'iterable', 'divisibleby(0)', 'in 1', 'nothing'))}",
        )
    )
