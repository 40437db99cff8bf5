"""Text in which some special tokens are what somebody said, and the others control the model."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import tokenizers

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_NEUTRAL = "\ue000"
"""A private-use character that takes the place of what was said."""


class SaidTokens:
    """Encodes the control tokens of some places of a text as ordinary text.

    A copy of the tokenizer knows its control tokens by names that no text holds. Those that are not said are written
    with these names, so that one encoding reads them as tokens and the rest of the text as it reads any text.

    Args:
        core: The tokenizer.
        control: The texts of its control tokens.
    """

    def __init__(self, core: tokenizers.Tokenizer, control: Collection[str]) -> None:
        self._core = core
        document, names = json.loads(core.to_str()), {}
        for token in document["added_tokens"]:
            if token["content"] in control:
                name = f"{_NEUTRAL}{secrets.token_hex(8)}{_NEUTRAL}"
                names[token["id"]] = name, token["content"]
                token["content"] = name
        document["post_processor"] = None
        model = document["model"]
        unknown = core.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        self._controls = names.keys() - {unknown}  # which the model makes of letters that it does not know
        self._names = names
        self._copy = tokenizers.Tokenizer.from_str(json.dumps(document))
        # A name that the model's vocabulary lacks gets an id of its own, and so may every added token after it.
        self._ids = {self._copy.token_to_id(token["content"]): token["id"] for token in document["added_tokens"]}

    def encode(self, text: str, said: Sequence[tuple[int, int]]) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            said: Spans of characters, ascending, whose control tokens are ordinary text.

        Raises:
            InputError: The tokenizer makes control tokens of ordinary text.
        """
        parts, end = [], 0
        for first, last in said:
            parts += [text[end:first], _NEUTRAL * (last - first)]
            end = last
        encoding = self._core.encode("".join([*parts, text[end:]]), add_special_tokens=False)
        parts, end, controls = [], 0, list[int]()
        for id_, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._names:
                name, content = self._names[id_]
                place = text.find(content, first, last)  # whitespace around it may belong to it
                if place < 0:  # a template writes tokens as they are; these letters became one by normalization
                    continue
                parts += [text[end:place], name]
                end = place + len(content)
                controls.append(id_)
        found = self._copy.encode("".join([*parts, text[end:]]), add_special_tokens=False).ids
        ids = [self._ids.get(id_, id_) for id_ in found]
        if [id_ for id_ in ids if id_ in self._controls] != [id_ for id_ in controls if id_ in self._controls]:
            raise InputError(
                "a message holds special tokens, and this tokenizer cannot read them as ordinary text",
                "Leave them out of the messages, or pass parse_special=True.",
            )
        return ids
