# ruff: noqa: RUF001
"""Read the tokenizer of a GGUF file: vocabulary, pre-tokenizer, special tokens, the tokens that end a generation."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edgemix.errors import InputError
from edgemix.export.models.gguf_header import DAMAGED, GgufHeader
from edgemix.export.models.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizerRow

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens that are cut out of the text before anything else."""

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Role of a token in the metadata -> transformers' name for it."""

_END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
"""Tokens that end a generation by their text, as llama.cpp has it."""

_FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Role of a token of fill-in-the-middle that ends a generation -> its texts, if the metadata do not state its id."""

_NOT_ENDS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|call|>", "<|flush|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
"""A vocabulary with all tokens of the set has this token within its turns."""


def end_token_ids(header: GgufHeader) -> list[int]:
    """Return the ids that end a generation: those of the metadata, and those that llama.cpp knows by their text.

    Raises:
        InputError: The metadata state an id that the vocabulary lacks.
    """
    ids = {token: index for index, token in enumerate(header.tokens)}
    ends = {ids[token] for token in _END_TOKENS & ids.keys()}
    ends |= {index for role in ("eos", "eot", "eom") if (index := header.token_id(role)) is not None}
    for role, texts in _FILL_IN_ENDS.items():
        stated = header.token_id(role)
        ends |= {stated} if stated is not None else {ids[text] for text in texts if text in ids}
    found = {header.tokens[index] for index in ends}
    ends -= {ids[token] for others, token in _NOT_ENDS if others <= found and token in ids}
    return sorted(ends)


def gguf_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        InputError: It is of a kind, or has a pre-tokenizer, that is not known.
    """
    kind = header.text("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(header)
    if kind == "llama":
        return _sentencepiece(header)
    raise InputError(
        f"{header.name}: a tokenizer of the kind {kind!r} (tokenizer.ggml.model) cannot be read",
        "Known are gpt2 (byte-level BPE) and llama (SentencePiece BPE). Give the model's Hugging Face folder.",
    )


def _byte_level(header: GgufHeader) -> PreTrainedTokenizerBase:
    row = _pre_tokenizer(header)
    vocabulary = {token: index for index, token in enumerate(header.tokens)}
    model = models.BPE(vocab=vocabulary, merges=_merges(header, vocabulary), ignore_merges=row.ignore_merges)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC() if row.nfc else None
    backend.pre_tokenizer = row.build()
    backend.decoder = decoders.ByteLevel()
    return _wrapped(header, backend, bos=row.bos)


def _pre_tokenizer(header: GgufHeader) -> PreTokenizerRow:
    name = header.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"{header.name}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known",
            f"Give the model's Hugging Face folder. Known are {', '.join(sorted(PRE_TOKENIZERS))}.",
        )
    return PRE_TOKENIZERS[name]


def _merges(header: GgufHeader, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    stated = header.metadata.get("tokenizer.ggml.merges")
    if not isinstance(stated, list):
        raise InputError(f"{header.name}: no merges (tokenizer.ggml.merges)", "Convert the model again.")
    merges = []
    for merge in stated:
        space = merge.find(" ", 1)  # a token may begin with one
        left, right = merge[:space], merge[space + 1 :]
        if not {left, right, left + right} <= vocabulary.keys():
            raise InputError(f"{header.name}: the merge {merge!r:.80} is not of its vocabulary", DAMAGED)
        merges.append((left, right))
    return merges


def _added(header: GgufHeader, kind: int) -> list[AddedToken]:
    """Return the tokens of a type that are matched as a whole in the text."""
    types = header.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return []
    if isinstance(types, list) or getattr(types, "shape", None) != (len(header.tokens),):
        raise InputError(f"{header.name}: tokenizer.ggml.token_type has not one type for each token", DAMAGED)
    return [
        AddedToken(header.tokens[index], normalized=False, special=kind == _CONTROL)
        for index in (types == kind).nonzero()[0]
    ]


def _post_processor(header: GgufHeader, bos: bool) -> processors.PostProcessor:
    """Return what puts the special tokens around a text that the metadata ask for."""
    eos = header.flag("tokenizer.ggml.add_eos_token", False)
    first = header.token_id("bos") if bos else None
    last = header.token_id("eos") if eos else None
    if first is None and last is None:
        return processors.ByteLevel(trim_offsets=False)
    ids = {header.tokens[index]: index for index in (first, last) if index is not None}
    parts = [None if first is None else header.tokens[first], "$A", None if last is None else header.tokens[last]]
    return processors.TemplateProcessing(single=[part for part in parts if part], special_tokens=list(ids.items()))


def _sentencepiece(header: GgufHeader) -> PreTrainedTokenizerBase:
    """Build a tokenizer of SentencePiece's BPE as transformers does, with the settings that it ignores."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    if header.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        raise InputError(
            f"{header.name}: tokenizer.ggml.remove_extra_whitespaces is not supported",
            "Give the model's Hugging Face folder.",
        )
    architecture, described, _ = get_gguf_tokenizer(str(header.path))
    backend, _ = convert_gguf_tokenizer(architecture, described)
    if not header.flag("tokenizer.ggml.add_space_prefix", True):
        _remove_prefix(backend)
    return _wrapped(header, backend, bos=True)


def _remove_prefix(backend: Tokenizer) -> None:
    """Put no space before a text."""
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _wrapped(header: GgufHeader, backend: Tokenizer, *, bos: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its special tokens and chat template.

    Args:
        header: The file's header.
        backend: The tokenizer.
        bos: Whether the beginning-of-text token comes first, if the file does not say.
    """
    backend.post_processor = _post_processor(header, header.flag("tokenizer.ggml.add_bos_token", bos))
    backend.add_special_tokens(_added(header, _CONTROL))
    backend.add_tokens(_added(header, _USER_DEFINED))
    ids = {name: header.token_id(role) for role, name in _ROLES.items()}
    special = {name: header.tokens[index] for name, index in ids.items() if index is not None}
    template = header.metadata.get("tokenizer.chat_template")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template if isinstance(template, str) else None, **special
    )
    if len(tokenizer) != len(header.tokens):
        raise InputError(
            f"{header.name}: its vocabulary has {len(header.tokens)} tokens, but its tokenizer needs {len(tokenizer)}",
            "Give the model's Hugging Face folder.",
        )
    return tokenizer
