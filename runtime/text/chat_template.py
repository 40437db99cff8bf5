"""Chat templates: conversations as text, by the Jinja template that comes with a model.

They render as transformers' `apply_chat_template` does. Special tokens in messages are told from those that the
template writes: the first are what somebody said, the others begin and end turns.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from edgemix.errors import InputError
from edgemix.runtime.cancellation import failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import jinja2

MAX_TEMPLATE = 1 << 18
"""Most characters of a template."""
_LONGEST_REASON = 1000
"""Most characters of an error that a template raises."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning; templates read the first, or the second."""
_MARKS = range(0xE000, 0xF8FF)
"""Private-use characters, two of which mark what was said."""


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
    conversation = [_with_reasoning(_plain(message)) for message in messages]
    schemas = _plain(tools)
    given = {"documents": None, **variables}

    def rendered(conversation: Any, schemas: Any) -> str:
        import jinja2

        from edgemix.runtime.text import template_sandbox as sandbox

        everything = {"messages": conversation, "tools": schemas, **given}
        try:
            return sandbox.render(_compiled(template), everything, longest)
        except BaseException as error:  # a template may raise anything
            reason = str(error) if isinstance(error, jinja2.TemplateError) else failure(error).message
            raise InputError(f"the chat template refuses these messages: {reason[:_LONGEST_REASON]}") from error

    text = rendered(conversation, schemas)
    pattern = _any_of(tuple(said))
    texts = "".join(_strings([conversation, schemas]))
    if pattern is None or pattern.search(texts) is None:
        return Rendered(text)
    unused = (chr(code) for code in _MARKS if chr(code) not in texts and chr(code) not in template)
    opening, closing = islice(unused, 2)
    marked = rendered(*_mapped([conversation, schemas], lambda each: pattern.sub(f"{opening}\\g<0>{closing}", each)))
    spans, plain = _marked_spans(marked, opening, closing)
    if plain != text:
        raise InputError(
            "the chat template changes what messages say, which hold special tokens: they cannot be told from its own",
            "Leave them out of the messages, or pass parse_special=True.",
        )
    return Rendered(text, spans)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    from edgemix.runtime.text.template_budget import TemplateLimitError
    from edgemix.runtime.text.template_sandbox import Sandbox

    if len(template) > MAX_TEMPLATE:
        raise TemplateLimitError(f"it has more than {MAX_TEMPLATE:,} characters")
    return Sandbox().template(template)


@lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _plain(value: Any) -> Any:
    """Return a copy of plain types: a template must not reach other objects. Messages lose keys without a value."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


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


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of which every text is changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _marked_spans(text: str, opening: str, closing: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """Return the spans between marks in the text without them, and that text. A mark without its other is dropped."""
    spans, parts, length, begun = [], [], 0, None
    for part in re.split(f"([{opening}{closing}])", text):
        if part == opening:
            begun = length
        elif part == closing:
            if begun is not None:
                spans.append((begun, length))
            begun = None
        else:
            parts.append(part)
            length += len(part)
    return tuple(spans), "".join(parts)
