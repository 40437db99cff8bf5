"""What an adapter's folder says about text: its tokenizer, its chat template, and the tokens that end a generation.

An adapter is often what taught its base to chat, so its own files go before the base's (vllm 17855).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from edgemix.errors import InputError
from edgemix.export.models.checkpoint import read_object
from edgemix.export.models.tokenizers import difference

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from transformers import PreTrainedTokenizerBase

    from edgemix.export.models.location import Location

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that make a tokenizer of their own."""

_RESIZED = (
    "Give the base with the embeddings and the tokenizer that the adapter was trained with; or remove the adapter's "
    "tokenizer files, if its texts need no other tokens."
)


def adapted_tokenizer(
    base: PreTrainedTokenizerBase, adapter: Location, read: Callable[[Location], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase:
    """Return a base's tokenizer with what an adapter's folder changes: the chat template, the end-of-text token.

    Args:
        base: The base's; stays as it is.
        adapter: The adapter.
        read: Reads a whole tokenizer.

    Raises:
        InputError: The adapter's tokenizer gives other ids than the base's.
    """
    if any((adapter.folder / name).is_file() for name in _VOCABULARIES):
        own = read(adapter)
        if found := difference(base, own):
            raise InputError(f"{adapter.name}: its tokenizer is not its base's: {found}", _RESIZED)
        if not own.chat_template:
            own.chat_template = base.chat_template
        if own.eos_token is None:
            own.eos_token = base.eos_token
        return own
    settings = _json(adapter, "tokenizer_config.json")
    vocabulary = base.get_vocab()
    for token, index in _added_tokens(adapter, settings):
        if vocabulary.get(token) != index:
            raise InputError(
                f"{adapter.name}: its tokenizer is not its base's: token {token!r} is id {index} in the adapter only",
                _RESIZED,
            )
    return _with_settings(base, adapter, settings, vocabulary)


def stated_end_ids(adapter: Location, vocabulary: int) -> list[int] | None:
    """Return the ids that end a generation by the adapter's generation_config.json; None if it does not say.

    Raises:
        InputError: They are no token ids.
    """
    stated = _json(adapter, "generation_config.json").get("eos_token_id")
    if stated is None:
        return None
    ids = stated if isinstance(stated, list) else [stated]
    if not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise InputError(
            f"{adapter.name}: eos_token_id in generation_config.json is {stated!r:.100}; it must be ids between 0 and "
            f"{vocabulary - 1}"
        )
    return ids


def _with_settings(
    base: PreTrainedTokenizerBase, adapter: Location, settings: dict[str, Any], vocabulary: Container[str]
) -> PreTrainedTokenizerBase:
    template, end = _template(adapter, settings), _content(settings.get("eos_token"))
    if not template and end in {None, base.eos_token}:
        return base
    tokenizer = copy.deepcopy(base)
    if template:
        tokenizer.chat_template = template
    if end is not None:
        if end not in vocabulary:
            raise InputError(f"{adapter.name}: its end-of-text token {end!r} is no token of its base", _RESIZED)
        tokenizer.eos_token = end
    return tokenizer


def _template(adapter: Location, settings: dict[str, Any]) -> str | None:
    """Return the chat template of a folder; the one named default if there are several."""
    path = adapter.folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{adapter.name}: {path.name} cannot be read: {error}") from error
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        named = (each for each in stated if isinstance(each, dict) and each.get("name") == "default")
        stated = next(named, {}).get("template")
    return stated if isinstance(stated, str) else None


def _added_tokens(adapter: Location, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the added tokens that a folder without a vocabulary states, with their ids."""
    yield from _json(adapter, "added_tokens.json").items()
    listed = settings.get("added_tokens_decoder")
    for index, token in listed.items() if isinstance(listed, dict) else ():
        if (content := _content(token)) is not None:
            yield content, int(index) if index.isdecimal() else index


def _content(token: Any) -> str | None:
    """Return the text of a token, which may be described by a JSON object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _json(adapter: Location, file: str) -> dict[str, Any]:
    path = adapter.folder / file
    return read_object(path, adapter.name) if path.is_file() else {}
