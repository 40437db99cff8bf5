"""Chat templates: conversations as text, by the Jinja template that comes with a model.

They render as transformers' `apply_chat_template` does. Special tokens in messages are told from those that the
template writes: the first are what somebody said, the others begin and end turns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from edgemix.errors import InputError
from edgemix.runtime.cancellation import failure
from edgemix.runtime.text.said_spans import said_spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import jinja2

MAX_TEMPLATE = 1 << 18
"""Most characters of a template."""
_LONGEST_REASON = 1000
"""Most characters of an error that a template raises."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning; templates read the first, or the second."""


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: The text.
        said: Spans of characters in it that messages hold and that look like special tokens.
    """

    text: str
    said: tuple[tuple[int, int], ...] = ()


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    longest: int,
    said: Iterable[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> Rendered:
    """Render a Hugging Face chat template. It comes with a model, so it runs in a sandbox.

    Args:
        template: Jinja source.
        messages: Mappings with a role and content.
        longest: Most characters of the text.
        said: Tokens whose places are returned where messages hold them.
        tools: JSON schemas of functions that the model may call.
        variables: Further variables, such as the texts of special tokens.

    Raises:
        InputError: The template refuses the variables, fails, takes too long or writes too much.
    """
    try:
        values = {"messages": [_with_reasoning(_plain(message)) for message in messages], "tools": _plain(tools)}
    except RecursionError as error:
        raise InputError("the messages are nested too deeply") from error
    given = {"documents": None, **variables}

    def rendered(values: Any, marks: Mapping[int, str]) -> str:
        import jinja2

        from edgemix.runtime.text import template_sandbox as sandbox

        try:
            compiled = _compiled(template)
            if isinstance(compiled, str):
                raise jinja2.TemplateError(compiled)
            return sandbox.render(compiled, {**values, **given}, longest, marks)
        except BaseException as error:  # a template may raise anything
            raise InputError(f"the chat template refuses these messages: {_reason(error)}") from error

    text = rendered(values, {})
    return Rendered(text, said_spans(text, values, template, tuple(said), rendered))


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template | str:
    """Return the compiled template, or the reason why it is none."""
    from edgemix.runtime.text.template_sandbox import Sandbox

    if len(template) > MAX_TEMPLATE:
        return f"it has more than {MAX_TEMPLATE:,} characters"
    try:
        return Sandbox().template(template)
    except Exception as error:  # noqa: BLE001 - a template may be anything
        return _reason(error)


def _reason(error: BaseException) -> str:
    import jinja2

    reason = str(error) if isinstance(error, jinja2.TemplateError) else failure(error).message
    return reason[:_LONGEST_REASON]


def _plain(value: Any) -> Any:
    """Return a copy of plain types: a template must not reach other objects. Messages lose keys without a value."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):  # an enumeration's member, too, is its value here
            return plain.__str__(value) if plain is str else plain(value)
    if hasattr(value, "items"):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
