"""The tokenizer of all members: the check that they share it, and its files in the bundle."""

from __future__ import annotations

import json
import shutil
from itertools import product, zip_longest
from typing import TYPE_CHECKING, get_args

from edgemix.bundle.manifest import CHAT_TEMPLATE, TOKENIZER, SpecialToken, TokenizerEntry
from edgemix.bundle.tokenizer_identity import TokenizerIdentity, first_difference, may_differ
from edgemix.errors import InputError, library_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_PROBES = (
    "The quick brown fox; it's 12345 o'clock — naïve café, “quoted”.",
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [1, 22, 333]}  # comment\n\n\n",
    "  leading, trailing  and   inner\u00a0spaces \r\n",
    "日本語のテキスト، نص عربي, кириллица, 🙂👩‍👩‍👧",
    "UPPER lower CamelCase snake_case http://example.org/?q=1&r=%20",
    "ﬁ ① Å e\u0301 ½ \u200b\u2028",
)
"""Text on which normalizers and pre-tokenizers are known to differ: digits, spaces, case, scripts, composition."""
_CHARACTERS = (
    "aAéßİǅ1²½Ⅷ٣ \t\n\r\u00a0\u3000\u200b\u2028\x00\x1f\ufeff.,'\"-_(/#$+™©яأ日あ한กअ\u0301🙂\u200d\ufe0f\ue000ﷺﬁ▁"
)
"""Characters of each kind that rules tell apart; where two rules are written differently, all pairs are probed."""
_FEW = "aA1 \n.'é日\u0301"
"""Those of which all triples are probed."""
_WORDS = (
    "don't DON'T we'll WE'LL I'm they've he'd it's IT'S l'été 'tis",
    "1 12 123 1234 12345 123456 1,234.56 -7 +8 1e9 0x1F v2.0",
    "a  b   c    d     e\n\n\nf\r\n\r\ng \n h\t\ti  \n",
    "!!! ??? ... --- === ``x`` ''y'' <<z>> [[w]] {{v}}",
)


def check_shared(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Check that all members turn every text into the same ids.

    Vocabularies, merges, added tokens and the model's settings are compared entry by entry; normalizers and
    pre-tokenizers that are not written alike on probes.

    Args:
        tokenizers: Member name -> its tokenizer.

    Raises:
        InputError: Two differ; names the members and the first difference.
    """
    first, *others = tokenizers
    for other in others:
        if found := difference(tokenizers[first], tokenizers[other]):
            raise InputError(
                f"members {first} and {other} have different tokenizers: {found}",
                "A mixture averages next-token probabilities, so its members must share one tokenizer.",
            )


def difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """Return the first thing that gives a text other ids with one tokenizer than with the other, in words."""
    if a is b:
        return None
    left, right = (TokenizerIdentity.parse(tokenizer_json(each)) for each in (a, b))
    if (found := first_difference(left, right)) is not None:
        return found
    return _encoding_difference(a, b, (*_PROBES, *_many_probes()) if may_differ(left, right) else _PROBES)


def _many_probes() -> Iterator[str]:
    """Yield text with all pairs and many triples of characters that rules tell apart."""
    yield from _WORDS
    for first in _CHARACTERS:
        yield "".join(f"{first}{second}" for second in _CHARACTERS)
    for first, second in product(_FEW, repeat=2):
        yield "".join(f"{first}{second}{third}" for third in _FEW)


def _encoding_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, probes: Iterable[str]) -> str | None:
    for probe in probes:
        for left, right in zip_longest(_ids(a, probe), _ids(b, probe)):
            if left != right:
                return f"{probe!r} is encoded with {left} by one where the other has {right}"
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with library_errors(f"a tokenizer fails on {text!r}", kind=InputError):
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=True).ids)


def describe(tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> TokenizerEntry:
    """Return the manifest's record of a tokenizer; `eos` are the ids that end a generation."""
    identity, special = TokenizerIdentity.parse(tokenizer_json(tokenizer)), tokenizer.special_tokens_map
    return TokenizerEntry(
        sha256=identity.sha256(),
        vocabulary=identity.size,
        eos=tuple(sorted(eos)),
        bos=leading_token(tokenizer),
        special_tokens={name: special[name] for name in get_args(SpecialToken) if name in special},
    )


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the beginning-of-text token's id, if encoding puts it before every text."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and _ids(tokenizer, "a")[:1] == [bos] else None


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files to the bundle at `folder`."""
    path = folder / TOKENIZER
    shutil.rmtree(path.parent, ignore_errors=True)  # an earlier tokenizer may have had a chat template
    path.parent.mkdir(parents=True)
    path.write_text(tokenizer_json(tokenizer), encoding="utf-8")
    template = chat_template(tokenizer)
    if template:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of token ids, added tokens and gaps included."""
    return TokenizerIdentity.parse(tokenizer_json(tokenizer)).size


def trained_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of token ids without trailing added tokens: those that every member has rows for."""
    return TokenizerIdentity.parse(tokenizer_json(tokenizer)).trained_size


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Check that a model has a row for every token but added ones, which then have a probability of zero.

    Args:
        tokenizer: The model's tokenizer.
        rows: Number of the model's logits.
        name: The member, for the message.

    Raises:
        InputError: It lacks other tokens, or the one with which texts begin.
    """
    needed = trained_size(tokenizer)
    if rows < needed:
        raise InputError(
            f"member {name}: the model has {rows} logits, but its tokenizer has {needed} tokens without added ones",
            "Give the tokenizer that the model was trained with, or resize the model's embeddings.",
        )
    if (leading := leading_token(tokenizer)) is not None and leading >= rows:
        raise InputError(
            f"member {name}: texts begin with token {leading}, and the model has {rows} logits",
            "Resize the model's embeddings, or take the beginning-of-text token that it was trained with.",
        )


def drop_absent_end(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Unset the end-of-text token if the model in `folder` has no row for it.

    Some tokenizers of transformers (Qwen2Tokenizer) add one of their own, with which documents would be separated.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        rows = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # an adapter's folder, or one that loading the model will refuse
    if isinstance(rows, int) and tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= rows:
        tokenizer.eos_token = None


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that turns messages into text; the one named default if there are several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer as JSON of the tokenizers library, without truncation and padding."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    parsed["truncation"] = parsed["padding"] = None
    return json.dumps(parsed, ensure_ascii=False)
