"""Grammars of generated text: JSON of a schema, a match of a regular expression, or one of several texts.

A grammar applies to the mixture's distribution after averaging: tokens that cannot lead to a valid text are ruled out,
the others keep their proportions. The end-of-text token counts as a token: it is allowed where the text is complete,
and is the only one allowed where the text must end. llguidance computes which tokens those are (Earley's parser
over a lexer of derivatives, github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import EdgemixError, InputError, library_errors
from edgemix.runtime.text.grammar_engine import llguidance_module
from edgemix.runtime.text.json_schema import schema_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgemix.runtime.text.tokenizer import Tokenizer

_IMPOSSIBLE = np.float32(-np.inf)
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write JSON, as Python does: where any white space is allowed, small models generate nothing else."""
_UNFORCED = '%llguidance {"no_forcing": true}\n'
"""Forced text may be spelled by any tokens: else llguidance allows only the tokenizer's own spelling, which is a
special token where a text contains what looks like one.
"""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a generated text must be; at most one of the three is given.

    Attributes:
        json_schema: A JSON schema, or its text.
        regex: A regular expression that the whole text matches.
        choices: Texts, one of which it is.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both constrain the text", "Give one of them.")
        if self.regex is not None and not _is_text(self.regex):
            raise InputError("regex must be a text of valid Unicode")
        if self.choices is not None and not _are_texts(self.choices):
            raise InputError("choices must be texts of valid Unicode, at least one, none of them empty")

    @property
    def free(self) -> bool:
        """Whether any text is allowed."""
        return self.json_schema is None and self.regex is None and self.choices is None

    @property
    def described(self) -> str:
        """What is given, for messages."""
        if self.regex is not None:
            return f"the expression {self.regex[:80]!r}"
        return "this schema" if self.json_schema is not None else "these choices"

    def grammar(self) -> str:
        """Return the grammar for llguidance.

        Raises:
            InputError: The schema is not JSON.
            EdgemixError: llguidance is not installed.
        """
        matcher = llguidance_module().LLMatcher
        if self.json_schema is not None:
            grammar = json.loads(matcher.grammar_from_json_schema(schema_text(self.json_schema), defaults=_JSON))
            lark = f"start: %json {json.dumps(grammar['grammars'][0]['json_schema'])}"
        elif self.regex is not None:
            lark = json.loads(matcher.grammar_from_regex(self.regex))["grammars"][0]["lark_grammar"]
        else:
            texts = (json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in self.choices or ())
            lark = f"start: {' | '.join(texts)}"
        return str(matcher.grammar_from_lark(_UNFORCED + lark))


class Grammar:
    """A constraint, compiled for a tokenizer. Threads may share it.

    Raises:
        InputError: No text can follow the constraint, or the tokenizer has no end-of-text token.
        EdgemixError: llguidance is not installed.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        what, remedy = constraint.described, "Correct it."
        with library_errors(f"no text can be held to {what}", remedy, InputError):
            source = constraint.grammar()
        if not any(token < tokenizer.vocabulary for token in tokenizer.entry.eos):
            raise InputError("this tokenizer has no end-of-text token, so a text of a given form could not end")
        self._tokenizer, words, matcher = tokenizer, tokenizer.words, llguidance_module().LLMatcher
        if trouble := matcher.validate_grammar(source, words):
            raise InputError(f"no text can be held to {what}: {_reason(trouble)}", remedy)
        self._matcher = matcher(words, source, log_level=0)
        try:
            self.follow().allowed()
        except EdgemixError as error:
            raise InputError(f"there is no text of this form: {error.message}", remedy) from None

    @classmethod
    def of(cls, constraint: Constraint, tokenizer: Tokenizer) -> Grammar | None:
        """Return the grammar of a constraint; None where any text is allowed."""
        return None if constraint.free else cls(constraint, tokenizer)

    def follow(self) -> GrammarState:
        """Return the state at the beginning of a text."""
        return GrammarState(self._matcher.deep_copy(), self._tokenizer)


class GrammarState:
    """The state of a grammar after a text. Made by `Grammar.follow`."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher, self._words = matcher, tokenizer.words
        self._vocabulary, self._eos = tokenizer.vocabulary, frozenset(tokenizer.entry.eos)
        self._ends = [token for token in tokenizer.entry.eos if token < tokenizer.vocabulary]
        self._ahead: tuple[int, ...] = ()
        self._masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}

    def allowed(self, ahead: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Return which tokens may follow the text and tokens `ahead` of it: bool [vocabulary], at least one true.

        Raises:
            EdgemixError: llguidance gives up (its limits bound time and memory).
        """
        position = self._before_end(ahead)
        if position not in self._masks:
            self._go(position)
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
            if not self._matcher.is_accepting():
                mask[self._ends] = False
            self._check(bool(mask.any()))
            self._masks[position] = mask
        return self._masks[position]

    def valid(self, tokens: Sequence[int]) -> int:
        """Return how many of some tokens may follow the text, one after the other."""
        self._go(())
        text = self._before_end(tokens)
        valid = int(self._matcher.validate_tokens([*text])) if text else 0
        if valid < len(text) or len(text) == len(tokens):
            return valid
        return valid + int(self.allowed(text)[tokens[valid]])

    def expected(self, ahead: Sequence[int] = ()) -> list[int]:
        """Return the tokens of the only continuation that is allowed after the text and tokens `ahead` of it, in the
        tokenizer's own spelling; other tokens may spell it, too.
        """
        self._go(self._before_end(ahead))
        forced: bytes = self._matcher.compute_ff_bytes()
        return [*self._words.tokenize_bytes(forced)] if forced else []

    def take(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text, each of which was allowed."""
        taken = self._before_end(tokens)
        self._go(taken)
        count = len(taken)
        self._masks = {position[count:]: mask for position, mask in self._masks.items() if position[:count] == taken}
        self._ahead = ()

    def _before_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens before the end-of-text token, which llguidance does not know."""
        return tuple(takewhile(lambda token: token not in self._eos, tokens))

    def _go(self, ahead: tuple[int, ...]) -> None:
        """Move to the position after some tokens that follow the text."""
        both = zip(self._ahead, ahead, strict=False)
        common = next(
            (position for position, (old, new) in enumerate(both) if old != new), min(len(self._ahead), len(ahead))
        )
        if back := len(self._ahead) - common:
            self._check(self._matcher.rollback(back))
        if new := ahead[common:]:
            self._check(self._matcher.consume_tokens([*new]))
        self._ahead = ahead

    def _check(self, fine: bool) -> None:
        if not fine or self._matcher.is_error():
            problem = self._matcher.get_error().strip() or "no token can follow"
            raise EdgemixError(
                f"the text cannot be held to its form: {problem.splitlines()[0]}",
                "Give a simpler schema or expression.",
            )


def rule_out(scores: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return scores [vocabulary] with -inf where a token is not allowed, in a new array."""
    return np.where(allowed, scores, _IMPOSSIBLE)


def only_one(allowed: NDArray[np.bool_]) -> int | None:
    """Return the allowed token, if there is exactly one."""
    first = int(allowed.argmax())
    return None if allowed[first + 1 :].any() else first


def _is_text(text: object) -> bool:
    """Return whether it is a nonempty text that UTF-8 can encode."""
    try:
        return isinstance(text, str) and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _are_texts(texts: object) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and bool(texts) and all(map(_is_text, texts))


def _reason(trouble: str) -> str:
    """Return why llguidance refuses a grammar: the message within its parser's report."""
    lines = [line.strip() for line in trouble.splitlines() if line.strip()]
    found = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), lines[0])
    if "lookaround" in found:
        return "look-around, word boundaries included, is not supported"
    return re.sub(r"^at \d+\(\d+\): ", "", found)
