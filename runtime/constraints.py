"""What a generated text must be: JSON of a schema, a match of a regular expression, one of several texts.

The rule applies to the mixture's distribution after averaging: tokens that cannot go on to a text of that form are
ruled out, the others keep their proportions. The end-of-text token counts as a token: it may come where the text is
complete, and nothing else may where the text can only end. llguidance computes which tokens those are (Earley's parser
over a lexer of derivatives, github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import EdgemixError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.tokenizer import Tokenizer

_IMPOSSIBLE = np.float32(-np.inf)
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write it, as Python does: where any white space may come, small models write nothing else."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a text must be, as the caller says it; one of the three.

    Attributes:
        json_schema: A JSON schema, or its text.
        regex: A regular expression that the whole text matches.
        choices: The texts that it may be.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both say what the text must be", "Give one of them.")
        if self.choices is not None and (isinstance(self.choices, str) or not self.choices or not all(self.choices)):
            raise InputError("choices must be texts, at least one, none of them empty")

    @property
    def free(self) -> bool:
        """Whether a text may be anything."""
        return self.json_schema is None and self.regex is None and self.choices is None

    def grammar(self) -> str:
        """As llguidance reads it.

        Raises:
            InputError: The schema is not JSON.
            EdgemixError: llguidance is not installed.
        """
        matcher = _llguidance().LLMatcher
        if self.json_schema is not None:
            schema = self.json_schema
            try:
                text = json.dumps(json.loads(schema) if isinstance(schema, str) else dict(schema))
                return str(matcher.grammar_from_json_schema(text, defaults=_JSON))
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"json_schema is no JSON: {error}", "Mend the schema.") from None
        if self.regex is not None:
            return str(matcher.grammar_from_regex(self.regex))
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choices or ())
        return str(matcher.grammar_from_lark(f"start: {texts}"))


class Grammar:
    """A constraint, compiled for a tokenizer. Threads may share it.

    Raises:
        InputError: The constraint makes no sense, or the tokenizer has no end of text.
        EdgemixError: llguidance is not installed.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        source = constraint.grammar()
        if not tokenizer.entry.eos:
            raise InputError("this tokenizer has no end-of-text token, so a text of a given form could not end")
        self._entry, words = tokenizer.entry, tokenizer.words
        if trouble := _llguidance().LLMatcher.validate_grammar(source, words):
            raise InputError(f"no text can be held to this: {trouble.strip().splitlines()[0]}", _form(constraint))
        self._matcher = _llguidance().LLMatcher(words, source)

    def follow(self) -> Follower:
        """Follow a text from its beginning."""
        return Follower(self._matcher.deep_copy(), self._entry.vocabulary, frozenset(self._entry.eos))


class Follower:
    """Where one text is in what it must become. Made by `Grammar.follow`."""

    def __init__(self, matcher: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._eos = matcher, vocabulary, eos
        self._ahead: list[int] = []
        self._masks: dict[int, NDArray[np.bool_]] = {}  # behind so many of them

    def allowed(self, ahead: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Which tokens may come behind the text and some tokens that may follow it: bool [vocabulary], some true.

        Raises:
            EdgemixError: llguidance gives up (its limits protect from what would take forever).
        """
        ahead = self._go(ahead)
        place = len(ahead)
        if place not in self._masks:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
            self._check(bool(mask.any()))
            self._masks[place] = mask
        return self._masks[place]

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may follow the text, one after the other."""
        self._go([])
        text = self._without_end(tokens)
        valid = int(self._matcher.validate_tokens(text)) if text else 0
        if valid < len(text) or len(text) == len(tokens):
            return valid
        return valid + int(self.allowed(text)[tokens[valid]])

    def take(self, tokens: Sequence[int]) -> None:
        """The text goes on with tokens, each of which was allowed."""
        taken = len(self._go(tokens))
        self._masks = {place - taken: mask for place, mask in self._masks.items() if place >= taken}
        self._ahead = []

    def _without_end(self, tokens: Sequence[int]) -> list[int]:
        """Tokens before the end of the text: that is no word of llguidance's."""
        return [*takewhile(lambda token: token not in self._eos, tokens)]

    def _go(self, tokens: Sequence[int]) -> list[int]:
        """Move to behind some tokens that may follow the text, or to its end: gives those before that."""
        ahead = self._without_end(tokens)
        both = zip(self._ahead, ahead, strict=False)
        common = next((place for place, (old, new) in enumerate(both) if old != new), min(len(self._ahead), len(ahead)))
        if back := len(self._ahead) - common:
            self._check(self._matcher.rollback(back))
        if new := ahead[common:]:
            self._check(self._matcher.consume_tokens(new))
        self._masks = {place: mask for place, mask in self._masks.items() if place <= common}
        self._ahead = ahead
        return ahead

    def _check(self, fine: bool) -> None:
        if not fine or self._matcher.is_error():
            trouble = self._matcher.get_error().strip() or "no token can go on"
            raise EdgemixError(
                f"the text cannot be held to its form: {trouble.splitlines()[0]}",
                "Give a simpler schema or expression.",
            )


def rule_out(scores: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Scores [vocabulary] with -inf where a token is not allowed: a new array."""
    return np.where(allowed, scores, _IMPOSSIBLE)


def only_one(allowed: NDArray[np.bool_]) -> int | None:
    """The token that is allowed, if there is but one."""
    first = int(allowed.argmax())
    return None if allowed[first + 1 :].any() else first


def vocabulary_of(core: Any, vocabulary: int, eos: Sequence[int]) -> Any:
    """A tokenizer as llguidance sees it: takes about 0.2 s of 49,000 tokens.

    Args:
        core: A `tokenizers.Tokenizer`.
        vocabulary: Number of token ids.
        eos: End-of-text tokens.

    Raises:
        EdgemixError: llguidance is not installed, or cannot read the tokenizer.
    """
    try:
        return _llguidance().LLTokenizer(core.to_str(), n_vocab=vocabulary, eos_token=list(eos))
    except (ValueError, TypeError, RuntimeError) as error:
        raise EdgemixError(f"llguidance cannot read this tokenizer: {error}") from error


def _form(constraint: Constraint) -> str:
    kind = "schema" if constraint.json_schema is not None else "expression" if constraint.regex else "choices"
    return f"Mend the {kind}."


def _llguidance() -> Any:
    """The llguidance module, imported when it is first needed."""
    try:
        import llguidance
    except ImportError:
        raise EdgemixError(
            "json_schema, regex and choices need llguidance, which is not installed",
            "pip install 'edgemix[constrained]'",
        ) from None
    return llguidance
