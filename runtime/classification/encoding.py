"""Texts, pairs of texts and lists of words to token ids, as Hugging Face's fast tokenizers encode them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from edgemix.errors import BundleError, InputError, library_errors
from edgemix.runtime.classification.batching import PaddedBatch, PaddingSide, length_batches, pad
from edgemix.runtime.text.tokenizer import check_unicode, load_core

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.manifest import SpecialToken

Text: TypeAlias = str | Sequence[str]
"""A text, or its words as they were split before; the text of words is the words with a space between."""

_TYPICAL = 8
"""Characters of a token, generously: how much of a long text is read at first."""
_MARGIN = 512
"""Characters before the end of a part of a text in which tokens may not be those of the whole text.

More than any word that WordPiece splits has (`tokenizer_files.document.MAX_WORD`). Of models that see a text as one
word (SentencePiece's BPE without a pre-tokenizer) no bound is proven: their choices reach back a few words.
"""


class EncodedText:
    """A text, a pair or a window of a text as tokens; its arrays are made when they are first read.

    Attributes:
        first: Which token of the text the window begins with; 0 but for windows of a long text.
    """

    def __init__(
        self, encoding: tokenizers.Encoding, first: int = 0, word_starts: Sequence[NDArray[np.int64]] | None = None
    ) -> None:
        """Wrap an encoding.

        Args:
            encoding: With special tokens.
            first: See the attribute.
            word_starts: Of each text that was given as words: the character where each word begins.
        """
        self._encoding = encoding
        self._word_starts = word_starts
        self.first = first

    def __len__(self) -> int:
        return len(self._encoding)

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Token ids [tokens]."""
        return np.array(self._encoding.ids, np.int64)

    @cached_property
    def type_ids(self) -> NDArray[np.int64]:
        """Type ids [tokens], as the tokenizer's template says."""
        return np.array(self._encoding.type_ids, np.int64)

    @cached_property
    def special(self) -> NDArray[np.bool_]:
        """Which tokens the template added [tokens]."""
        return np.array(self._encoding.special_tokens_mask, np.bool_)

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """The text of each token [tokens]: 0, 1 for the second of a pair, -1 for tokens of the template."""
        return _numbers(self._encoding.sequence_ids)

    @cached_property
    def words(self) -> NDArray[np.int64]:
        """The word of each token [tokens], as the pre-tokenizer splits its text or as they were given; -1 for none."""
        return _numbers(self._encoding.word_ids)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First character of each token in its text, and the one after its last [tokens, 2]; zeros for the template's.

        For words they count in the text of all words with a space between.
        """
        offsets = np.array(self._encoding.offsets, np.int64).reshape(-1, 2)
        for sequence, starts in enumerate(self._word_starts or ()):
            tokens = (self.sequences == sequence) & (self.words >= 0)
            offsets[tokens] += starts[self.words[tokens], None]
        return offsets

    @property
    def tokens(self) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return list(self._encoding.tokens)


class TextEncoder:
    """A member's tokenizer. Threads may share it.

    Attributes:
        max_length: Most tokens of a text or pair, special tokens included; longer ones are cut.
        special_tokens: Their texts by name.
        pad_id: Id of the padding; the attention mask hides it.
        padding_side: Where padding goes: `right`, but for members that read the last token of a batch's row (XLNet's
            head). Masks make both equal for all others.
        vocabulary: Number of ids that the member has rows for; None for all of the tokenizer's.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        max_length: int,
        special_tokens: Mapping[SpecialToken, str] = MappingProxyType({}),
        pad_type_id: int = 0,
        padding_side: PaddingSide = "right",
        vocabulary: int | None = None,
    ) -> None:
        """Wrap a tokenizer; its truncation and padding are removed.

        Args:
            core: The tokenizer.
            max_length: See the attributes; as the three next.
            special_tokens: As in the manifest.
            pad_type_id: Type id of padding.
            padding_side: See the attributes.
            vocabulary: See the attributes.

        Raises:
            BundleError: `max_length` leaves no room for the text.
        """
        core.no_truncation()
        core.no_padding()
        self._core = core
        with library_errors("the tokenizer cannot be copied", kind=BundleError):
            self._bare = tokenizers.Tokenizer.from_str(core.to_str())
            # Its template, and its trimming of offsets, must be applied once: after truncation.
            self._bare.post_processor = None
            self._added = [core.num_special_tokens_to_add(pair) for pair in (False, True)]
        if max_length <= self._added[1]:
            raise BundleError(
                f"texts may have {max_length} tokens, and a pair of texts has {self._added[1]} special tokens alone",
                "max_length must be greater.",
            )
        self.max_length = max_length
        self.special_tokens = special_tokens
        self.pad_id = self.special_id("pad_token") or 0
        self.padding_side = padding_side
        self._pad_type_id = pad_type_id
        self.vocabulary = vocabulary

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        max_length: int,
        special_tokens: Mapping[SpecialToken, str] = MappingProxyType({}),
        pad_type_id: int = 0,
        padding_side: PaddingSide = "right",
        vocabulary: int | None = None,
    ) -> TextEncoder:
        """Read a tokenizer.json; see the constructor.

        Raises:
            BundleError: It is missing, damaged, or beyond the bounds of `edgemix.tokenizer_files`.
        """
        return cls(
            load_core(path),
            max_length=max_length,
            special_tokens=special_tokens,
            pad_type_id=pad_type_id,
            padding_side=padding_side,
            vocabulary=vocabulary,
        )

    def special_id(self, name: SpecialToken) -> int | None:
        """Return the id of a special token by its name; None without one."""
        text = self.special_tokens.get(name)
        with library_errors(f"the tokenizer fails on {name}"):
            return None if text is None else self._core.token_to_id(text)

    @cached_property
    def marks_subwords(self) -> bool:
        """Whether the vocabulary marks tokens that continue a word, as WordPiece does with ##."""
        return bool(getattr(self._core.model, "continuing_subword_prefix", None))

    def vocab(self) -> dict[str, int]:
        """Return the vocabulary, added tokens included: token -> id."""
        with library_errors("the tokenizer's vocabulary cannot be read"):
            return dict(self._core.get_vocab())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        with library_errors("the tokenizer's added tokens cannot be read"):
            added = self._core.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    def decode_batch(self, ids: Sequence[list[int]]) -> list[str]:
        """Return the texts of sequences of token ids, special tokens included."""
        with library_errors("the tokenizer fails on these tokens"):
            return list(self._core.decode_batch(ids, skip_special_tokens=False))

    def encode(self, text: Text, pair: Text | None = None) -> EncodedText:
        """Encode a text or a pair of texts; see `encode_batch`."""
        return self.encode_batch([text], None if pair is None else [pair])[0]

    def encode_batch(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> list[EncodedText]:
        """Encode texts or pairs of texts, each cut to `max_length` tokens (of a pair: the longer first).

        Of a long text only a beginning is read, until it has enough tokens. A text without any token is encoded as a
        special token where the tokenizer has one.

        Args:
            texts: All given as texts or all as words.
            pairs: The second of each pair, given likewise.

        Raises:
            InputError: A text is neither text nor words, not valid Unicode, empty where there is no special token, or
                it has a token that the member has no row for.
        """
        both = [texts] if pairs is None else [texts, pairs]
        words = _are_words([text for each in both for text in each])
        rows = list(zip(*both, strict=True))
        most = _TYPICAL * self.max_length + 2 * _MARGIN
        short = [row for row, given in enumerate(rows) if all(_characters(text) <= most for text in given)]
        with library_errors("the tokenizer fails on these texts", "Change the texts."):
            given = [rows[row] if pairs is not None else rows[row][0] for row in short]
            found = dict(zip(short, self._core.encode_batch(given, is_pretokenized=words), strict=True))
            whole = [found.get(row) for row in range(len(rows))]
            cut = [
                self._cut(given, words=words) if encoding is None or len(encoding) > self.max_length else encoding
                for given, encoding in zip(rows, whole, strict=True)
            ]
        return [self._checked(encoding, given, words=words) for encoding, given in zip(cut, rows, strict=True)]

    def windows(self, text: Text, stride: int) -> list[EncodedText]:
        """Encode a text whole, in windows of at most `max_length` tokens, of which neighbors share `stride`.

        Raises:
            InputError: As `encode_batch`, or the stride is more than half of what a window holds.
        """
        words, most = _are_words([text]), self.max_length - self._added[0]
        if not 0 <= stride <= most // 2:
            raise InputError(f"the stride is {stride}, and must be 0 to {most // 2}, half of a window")
        with library_errors("the tokenizer fails on this text", "Change the text."):
            raw = self._bare.encode(text, is_pretokenized=words, add_special_tokens=False)
            raw.truncate(most, stride=stride)
            encoding = self._core.post_process(raw)
            encodings = [encoding, *encoding.overflowing]
        return [
            self._checked(encoding, (text,), words=words, first=window * (most - stride))
            for window, encoding in enumerate(encodings)
        ]

    def pad(self, texts: Sequence[EncodedText]) -> PaddedBatch:
        """Pad texts to the longest of them, as the member needs it."""
        return pad(texts, pad_id=self.pad_id, pad_type_id=self._pad_type_id, side=self.padding_side)

    def batches(
        self, texts: Sequence[EncodedText], most_tokens: int
    ) -> Iterator[tuple[NDArray[np.int64], PaddedBatch]]:
        """Yield padded batches of texts of similar length, each with the places of its texts; see `length_batches`."""
        for places in length_batches([len(text) for text in texts], most_tokens):
            yield places, self.pad([texts[place] for place in places])

    def _cut(self, given: Sequence[Text], *, words: bool) -> tokenizers.Encoding:
        """Encode a text or pair whose end may not count."""
        most = self.max_length - self._added[len(given) - 1]
        raw = [self._beginning(text, most, words=words) for text in given]
        lengths = [len(each) for each in raw]
        if len(given) > 1 and most % 2 and min(lengths) > most:
            # The longer of two keeps the odd token, so both must be counted.
            lengths = [len(self._bare.encode(text, is_pretokenized=words, add_special_tokens=False)) for text in given]
        kept = [_first_tokens(*each) for each in zip(raw, longest_first(lengths, most), strict=True)]
        return self._core.post_process(kept[0], kept[1] if len(kept) > 1 else None)

    def _beginning(self, text: Text, tokens: int, *, words: bool) -> tokenizers.Encoding:
        """Encode a text without special tokens: whole, or as much that more than `tokens` tokens are certain."""
        size = tokens + 1 if words else _TYPICAL * tokens + 2 * _MARGIN
        while size < len(text):
            part = text[: _boundary(text, size) if isinstance(text, str) else size]
            raw = self._bare.encode(part, is_pretokenized=words, add_special_tokens=False)
            # Words are encoded each for itself. White space at the end may belong to an added token after it.
            sure = len(part.rstrip()) - _MARGIN if isinstance(part, str) else math.inf
            if len(raw) > tokens and raw.offsets[tokens][1] <= sure:
                return raw
            size *= 2
        return self._bare.encode(text, is_pretokenized=words, add_special_tokens=False)

    def _checked(
        self, encoding: tokenizers.Encoding, given: Sequence[Text], *, words: bool, first: int = 0
    ) -> EncodedText:
        """Return an encoding as a text, after a check that it has tokens, and the member all of them."""
        starts = [word_starts(text) for text in given] if words else None
        encoded = EncodedText(encoding if len(encoding) else self._nothing, first, starts)
        if self.vocabulary is not None and (greatest := int(encoded.ids.max())) >= self.vocabulary:
            raise InputError(
                f"the text holds the token {self._core.id_to_token(greatest)!r}, which the member has no row for: its "
                f"id is {greatest}, and there are {self.vocabulary}",
                "Leave it out of the text.",
            )
        return encoded

    @cached_property
    def _nothing(self) -> tokenizers.Encoding:
        """Tokens of a text without any: one special token."""
        names: tuple[SpecialToken, ...] = ("cls_token", "bos_token", "eos_token", "pad_token", "unk_token")
        for name in names:
            if (id_ := self.special_id(name)) is not None:
                core, token = tokenizers.Tokenizer.from_str(self._bare.to_str()), self.special_tokens[name]
                core.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, id_)])
                return core.encode("")
        raise InputError("the text is empty", "Give at least one character.")


def _first_tokens(encoding: tokenizers.Encoding, kept: int) -> tokenizers.Encoding:
    """Return the first tokens of an encoding, without a window for each of the many others.

    The windows of a pair would be all of one text's with all of the other's.
    """
    rest = len(encoding) - kept
    if 0 < kept <= rest:
        encoding.truncate(rest, direction="left")  # leaves one window: what comes before the rest
        return encoding.overflowing[0]
    encoding.truncate(kept)
    return encoding


def longest_first(lengths: Sequence[int], most: int) -> list[int]:
    """Return how many tokens of each text of a pair (or of one text) are kept, so that all are at most `most`.

    The longer is cut until both are equal, then both; of an odd number the longer keeps the middle one.
    """
    if sum(lengths) <= most:
        return list(lengths)
    if len(lengths) == 1:
        return [most]
    short = min(lengths)
    kept = (short, most - short) if short <= most // 2 else (most // 2, most - most // 2)
    return list(kept if lengths[0] <= lengths[1] else reversed(kept))


def word_starts(words: Text) -> NDArray[np.int64]:
    """Return the character where each word begins in the text of all words with a space between: [words]."""
    lengths = np.array([len(word) for word in words], np.int64)
    return np.cumsum(lengths + 1) - lengths - 1


def joined(text: Text) -> str:
    """Return a text, or the text of words, whose characters offsets count."""
    return text if isinstance(text, str) else " ".join(text)


def _are_words(texts: Sequence[Text]) -> bool:
    """Return whether texts are given as words, after a check that all or none are, and all are Unicode."""
    words = [not isinstance(text, str) for text in texts]
    if any(words) != all(words):
        raise InputError("of several texts, either all or none may be given as words")
    for text in texts:
        is_list = isinstance(text, list | tuple) and all(isinstance(word, str) for word in text)
        if not isinstance(text, str) and not is_list:
            raise InputError(f"a text must be a string or a list of words, and is {type(text).__name__}")
        check_unicode(joined(text))
    return any(words)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text) + sum(map(len, text))


def _boundary(text: str, size: int) -> int:
    """Return where to cut a text to at most `size` characters: at the last white space of the margin, if any."""
    spaces = (place for place in range(size, size - _MARGIN, -1) if text[place].isspace())
    return next(spaces, size)


def _numbers(values: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array([-1 if value is None else value for value in values], np.int64)
