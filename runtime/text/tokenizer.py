"""Text to token ids and back: the tokenizer that a bundle's members share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from edgemix.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from edgemix.bundle.paths import resolve
from edgemix.errors import BundleError, EdgemixError, InputError, library_errors
from edgemix.runtime.text.chat_template import Rendered, render_template
from edgemix.runtime.text.grammar_engine import vocabulary_of
from edgemix.runtime.text.said_tokens import SaidTokens
from edgemix.tokenizer_files.document import checked_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemix.bundle.manifest import SpecialToken, TokenizerEntry

LONGEST_CHAT = 1 << 24
"""Most characters of a conversation as text, where the context does not say less."""


def check_unicode(text: str) -> None:
    """Raise InputError if a text holds what no Unicode text does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid Unicode: {error}", "Remove lone surrogates.") from error


@contextmanager
def _text_errors(text: str) -> Iterator[None]:
    """Refuse a text that is no Unicode, and translate what the tokenizer raises of another."""
    check_unicode(text)
    with library_errors("the tokenizer fails on this text", "Change the text."):
        yield


@contextmanager
def _reading_errors(named: Path) -> Iterator[None]:
    """Translate what reading a tokenizer's files raises."""
    try:
        yield
    except (EdgemixError, OSError, ValueError) as error:
        reason = error.message if isinstance(error, EdgemixError) else error
        raise BundleError(f"{named}: the tokenizer cannot be read: {reason}", "Export the bundle again.") from error


def load_core(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, after all checks of it; without its truncation and padding.

    Raises:
        BundleError: It is missing, damaged, or beyond the bounds of `edgemix.tokenizer_files`.
    """
    with _reading_errors(path), library_errors("it cannot be built"):
        return tokenizers.Tokenizer.from_str(checked_text(path))


class Tokenizer:
    """The tokenizer that a bundle's members share. Threads may share it.

    Attributes:
        entry: Its entry in the manifest.
        chat_template: The Jinja template of conversations; None if the bundle has none.
        vocabulary: Number of ids that the members have rows for; by default all of the tokenizer's.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        entry: TokenizerEntry,
        chat_template: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.chat_template = chat_template
        self.entry = entry
        self.vocabulary = entry.vocabulary if vocabulary is None else vocabulary

    @classmethod
    def load(cls, bundle: Path, entry: TokenizerEntry, vocabulary: int | None = None) -> Tokenizer:
        """Read a bundle's tokenizer; see the attributes.

        Raises:
            BundleError: A file is missing, damaged, or not the manifest's tokenizer.
        """
        template = resolve(bundle, CHAT_TEMPLATE)
        core = load_core(resolve(bundle, TOKENIZER))
        with _reading_errors(bundle):
            chat_template = template.read_text("utf-8") if template.is_file() else None
        with library_errors(f"{bundle}: the tokenizer cannot be read", kind=BundleError):
            size = max(core.get_vocab().values(), default=-1) + 1
        if size > entry.vocabulary:
            raise BundleError(
                f"{bundle}: the tokenizer has {size} token ids, the manifest says {entry.vocabulary}",
                "Export the bundle again.",
            )
        return cls(core, entry, chat_template, vocabulary)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the token ids of a text, after the beginning-of-text token where the model family has one and `bos` is
        true.

        Raises:
            InputError: The text is empty, not valid Unicode, or holds a token that not every member has.
        """
        return self._encode(text, bos=bos)[0]

    def encode_for_scoring(self, text: str) -> tuple[list[int], int]:
        """Return the token ids as `encode` does, and the number of UTF-8 bytes of all tokens but the first.

        Raises:
            InputError: As `encode`, or the text is a single token, which cannot be scored.
        """
        ids, starts = self._encode(text, bos=True)
        if len(ids) < 2:
            raise InputError("a text of one token cannot be scored", "Give a longer text.")
        return ids, len(text[starts[1] :].encode())

    def _encode(self, text: str, *, bos: bool) -> tuple[list[int], list[int]]:
        """Return token ids, and the index of the character where each begins."""
        with _text_errors(text):
            encoding = self._core.encode(text, add_special_tokens=False)
        first = [self.entry.bos] if bos and self.entry.bos is not None else []
        ids = [*first, *encoding.ids]
        return self._known(ids), [0] * len(first) + [start for start, _ in encoding.offsets]

    def _known(self, ids: list[int]) -> list[int]:
        """Return ids, after a check that there are some and that every member has them."""
        if not ids:
            raise InputError("the text is empty", "Give at least one character.")
        if (greatest := max(ids)) >= self.vocabulary:
            raise InputError(
                f"the text holds the token {self.token(greatest)!r}, which not every member has: its id is {greatest}, "
                f"and they share {self.vocabulary} tokens",
                "Leave it out of the text.",
            )
        return ids

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` leaves out."""
        with library_errors("the tokenizer's added tokens cannot be read"):
            added = self._core.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    @cached_property
    def words(self) -> Any:
        """The vocabulary as llguidance reads it, for `grammar`.

        Raises:
            EdgemixError: As `vocabulary_of`.
        """
        return vocabulary_of(self._core, self.entry.vocabulary, self.entry.eos)

    def shorten(self, text: str, tokens: int) -> str:
        """Return the beginning of a text that has at most `tokens` tokens.

        Raises:
            InputError: As `encode`.
        """
        ids, starts = self._encode(text, bos=True)
        return text if len(ids) <= tokens else text[: starts[tokens]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        with library_errors("the tokenizer fails on these tokens"):
            return str(self._core.decode(list(ids), skip_special_tokens=True))

    def token(self, id_: int | None) -> str:
        """Return a token as text, special tokens included; empty for None."""
        if id_ is None:
            return ""
        with library_errors(f"the tokenizer fails on token {id_}"):
            return self._core.id_to_token(id_) or ""

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the tokenizer's file writes it."""
        with library_errors("the tokenizer's vocabulary cannot be read"):
            return max(map(len, self._core.get_vocab()), default=1)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that control the model: special ones, and other added ones that the chat template
        writes.
        """
        template = self.chat_template or ""
        with library_errors("the tokenizer's added tokens cannot be read"):
            added = self._core.get_added_tokens_decoder().values()
        return tuple(
            token.content
            for token in added
            if token.special or (not token.content.isspace() and token.content in template)
        )

    @cached_property
    def _normalizes(self) -> bool:
        """Whether other letters may become control tokens by normalization."""
        with library_errors("the tokenizer's added tokens cannot be read"):
            added = self._core.get_added_tokens_decoder().values()
        control = set(self.control_tokens)
        return self._core.normalizer is not None and any(
            token.normalized for token in added if token.content in control
        )

    @cached_property
    def _said(self) -> SaidTokens:
        with library_errors("the tokenizer cannot be copied"):
            return SaidTokens(self._core, self.control_tokens)

    def special_id(self, name: SpecialToken) -> int | None:
        """Return the id of a special token by its name, as the tokenizer's own settings have it; None without one."""
        text = self.entry.special_tokens.get(name)
        if text is None:
            return None
        with library_errors(f"the tokenizer fails on {name}"):
            return self._core.token_to_id(text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        longest: int = LONGEST_CHAT,
    ) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: Mappings with at least `role` and `content`, as the model's chat template expects them.
            tools: JSON schemas of functions that the model may call, for templates that know of them.
            parse_special: Whether special tokens that stand in messages control the model, as those of the template
                do. By default they are text: nobody can end their turn and speak as another.
            longest: Most characters of the conversation as text.

        Raises:
            InputError: There is no chat template, or it refuses the messages.
        """
        said = () if parse_special else self.control_tokens
        rendered = self._rendered(messages, answer=True, tools=tools, said=said, longest=longest)
        if not rendered.said and (parse_special or not self._normalizes):
            # The template writes the beginning-of-text token itself.
            return self.encode(rendered.text, bos=False)
        with _text_errors(rendered.text):
            return self._known(self._said.encode(rendered.text, rendered.said))

    def write_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return a conversation as text, by the chat template.

        Args:
            messages: As `render`.
            answer: Whether to append the beginning of the assistant's answer.
            tools: As `render`.

        Raises:
            InputError: As `render`.
        """
        return self._rendered(messages, answer=answer, tools=tools).text

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        said: Sequence[str] = (),
        longest: int = LONGEST_CHAT,
    ) -> Rendered:
        if self.chat_template is None:
            raise InputError("this bundle's tokenizer has no chat template", "Use generate with a prompt.")
        fine = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
        )
        if not messages or not fine:
            raise InputError("a conversation needs at least one message, each with a role and content")
        special = self.entry.special_tokens or {
            "bos_token": self.token(self.entry.bos),
            "eos_token": self.token(next(iter(self.entry.eos), None)),
        }
        return render_template(
            self.chat_template,
            messages,
            longest=longest,
            said=said,
            tools=tools,
            add_generation_prompt=answer,
            **special,
        )
