"""Chat templates: conversations as text, by the Jinja template that comes with a model."""

from __future__ import annotations

import json
import time
from typing import Any

from edgemix.errors import InputError

_TEMPLATE_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


def render_template(template: str, **variables: Any) -> str:
    """Render a Hugging Face chat template. It comes with a model, so it runs in a sandbox.

    Raises:
        InputError: The template refuses the variables, or fails.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's turns for training; it has no effect here."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    try:
        return environment.from_string(template).render(**variables, tools=None)
    except (*_TEMPLATE_ERRORS, jinja2.TemplateError) as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
