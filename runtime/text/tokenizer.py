"""Text to token ids and back: encoding, decoding token by token, stop strings, chat templates."""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from edgemix.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from edgemix.bundle.paths import resolve
from edgemix.errors import BundleError, InputError
from edgemix.runtime.text.grammar import vocabulary_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.manifest import TokenizerEntry

_TEMPLATE_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
_UNFINISHED = "\ufffd"
_CONTEXT = 6
"""Tokens before the first new one that decoding looks at: decoders treat a text's first token differently."""


class Tokenizer:
    """The tokenizer that a bundle's members share. Threads may share it.

    Attributes:
        entry: What the manifest says of it.
        chat_template: How a conversation is written down, in Jinja; None if the bundle does not say.
    """

    def __init__(self, core: tokenizers.Tokenizer, entry: TokenizerEntry, chat_template: str | None = None) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.chat_template = chat_template
        self.entry = entry

    @classmethod
    def load(cls, bundle: Path, entry: TokenizerEntry) -> Tokenizer:
        """Read a bundle's tokenizer.

        Raises:
            BundleError: A file is missing, damaged, or not the manifest's tokenizer.
        """
        template = resolve(bundle, CHAT_TEMPLATE)
        try:
            core = tokenizers.Tokenizer.from_file(str(resolve(bundle, TOKENIZER)))
            chat_template = template.read_text("utf-8") if template.is_file() else None
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{bundle}: the tokenizer cannot be read: {error}", "Export the bundle again.") from error
        if (size := max(core.get_vocab().values(), default=-1) + 1) > entry.vocabulary:
            raise BundleError(
                f"{bundle}: the tokenizer has {size} token ids, the manifest says {entry.vocabulary}",
                "Export the bundle again.",
            )
        return cls(core, entry, chat_template)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of a text, after the beginning-of-text token where the model family has one and `bos` is true.

        Raises:
            InputError: There is nothing in the text, or it is not Unicode.
        """
        return self._encode(text, bos=bos)[0]

    def encode_for_scoring(self, text: str) -> tuple[list[int], int]:
        """As `encode`, with the number of UTF-8 bytes of all tokens but the first.

        Raises:
            InputError: As `encode`, or the text is a single token, so that there is nothing to score.
        """
        ids, starts = self._encode(text, bos=True)
        if len(ids) < 2:
            raise InputError("a text of one token cannot be scored", "Give a longer text.")
        return ids, len(text[starts[1] :].encode())

    def _encode(self, text: str, *, bos: bool) -> tuple[list[int], list[int]]:
        """Token ids, and the character where each begins."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode: {error}", "Remove lone surrogates.") from error
        encoding = self._core.encode(text, add_special_tokens=False)
        first = [self.entry.bos] if bos and self.entry.bos is not None else []
        ids = [*first, *encoding.ids]
        if not ids:
            raise InputError("the text is empty", "Give at least one character.")
        return ids, [0] * len(first) + [start for start, _ in encoding.offsets]

    @cached_property
    def words(self) -> Any:
        """What each token is as text, for `constraints`.

        Raises:
            EdgemixError: As `vocabulary_of`.
        """
        return vocabulary_of(self._core, self.entry.vocabulary, self.entry.eos)

    def shorten(self, text: str, tokens: int) -> str:
        """The beginning of a text that has no more than so many tokens.

        Raises:
            InputError: As `encode`.
        """
        ids, starts = self._encode(text, bos=True)
        return text if len(ids) <= tokens else text[: starts[tokens]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def token(self, id_: int | None) -> str:
        """A token as it is written in a text, special ones too; nothing for none."""
        return "" if id_ is None else self._core.id_to_token(id_) or ""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: Mappings with at least `role` and `content`, as the model's chat template wants them.

        Raises:
            InputError: There is no chat template, or it refuses the messages.
        """
        # The template writes the beginning-of-text token itself.
        return self.encode(self.write_chat(messages), bos=False)

    def write_chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """A conversation as the chat template writes it down.

        Args:
            messages: As `render`.
            answer: Whether the beginning of the assistant's answer follows.

        Raises:
            InputError: As `render`.
        """
        if self.chat_template is None:
            raise InputError("this bundle's tokenizer has no chat template", "Use generate with a prompt.")
        if not messages or not all({"role", "content"} <= set(message) for message in messages):
            raise InputError("a conversation needs at least one message, each with a role and content")
        return _render(
            self.chat_template,
            messages=[*messages],
            bos_token=self.token(self.entry.bos),
            eos_token=self.token(next(iter(self.entry.eos), None)),
            add_generation_prompt=answer,
        )


class IncrementalDecoder:
    """Decodes a text as its tokens arrive, whole characters only.

    A character whose bytes are spread over several tokens comes with the last of them; one that is still unfinished
    when the tokens end is left out. What comes is exactly what decoding prompt and new tokens at once would add.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        start = max(0, len(prompt) - _CONTEXT)
        while start > 0 and tokenizer.decode(prompt[start:]).startswith(_UNFINISHED):
            start -= 1  # it would begin within a character
        self._ids = list(prompt[start:])
        self._shown = tokenizer.decode(self._ids)
        self._new = 0

    def add(self, token: int) -> str:
        """The text that has become certain with `token`; often empty."""
        self._ids.append(token)
        self._new += 1
        text = self._tokenizer.decode(self._ids)
        added = text[len(self._shown) :]
        if not added or text.endswith(_UNFINISHED):
            return ""
        # What was added begins and ends with whole characters: context enough for what comes.
        self._ids = self._ids[-self._new :]
        self._shown = self._tokenizer.decode(self._ids)
        self._new = 0
        return added


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string has been found right after it."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _render(template: str, **variables: Any) -> str:
    """A Hugging Face chat template filled in. It comes with a model, so it runs in a sandbox."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's turns for training; here it changes nothing."""

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
