# ruff: noqa: RUF001
"""The pre-tokenizers that GGUF files name (`tokenizer.ggml.pre`), as llama.cpp knows them.

Each rule is spelled as the tokenizer.json of the models that it comes from, so that a Hugging Face folder and a GGUF
file of one model have the same tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_JAIS2 = (
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_CHINESE, _KANA = "[一-龥ࠀ-一가-퟿]+", "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}"
    r"ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_SIGNS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"


@dataclass(frozen=True)
class PreTokenizerRow:
    """How text is cut before byte-pair merges.

    Attributes:
        steps: Pre-tokenizers, one after the other.
        nfc: The text is composed (NFC) first.
        ignore_merges: A piece that is a token as a whole is that token, whatever the merges make of it.
        bos: The beginning-of-text token comes first, unless the file says otherwise.
    """

    steps: tuple[PreTokenizer, ...]
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False

    def build(self) -> PreTokenizer:
        """Return the steps as one pre-tokenizer."""
        return self.steps[0] if len(self.steps) == 1 else Sequence(list(self.steps))


_GPT2_RULE = ByteLevel(add_prefix_space=False, use_regex=True)
_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)


def _splits(*patterns: str) -> PreTokenizerRow:
    """Return the row of regular expressions that cut out what they match, one after the other."""
    return PreTokenizerRow((*(Split(Regex(pattern), "isolated") for pattern in patterns), _BYTES))


_PLAIN = PreTokenizerRow((_GPT2_RULE,))
_ONE_DIGIT = PreTokenizerRow((Digits(individual_digits=True), _GPT2_RULE))
_LLAMA = replace(_splits(_LLAMA3), ignore_merges=True, bos=True)
_QWEN = replace(_splits(_QWEN2), nfc=True)
_DEEPSEEK_DIGITS = (Digits(individual_digits=True), _BYTES)

_FAMILIES: tuple[tuple[str, PreTokenizerRow], ...] = (
    ("default", _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling", _PLAIN),
    ("mpt olmo", replace(_PLAIN, nfc=True)),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _ONE_DIGIT),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA),
    ("dbrx smaug-bpe glm4 chatglm-bpe", _splits(_LLAMA3)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", _QWEN),
    ("hunyuan solar-open grok-2", _splits(_QWEN2)),
    ("qwen35", replace(_splits(_QWEN35), nfc=True)),
    ("tekken", replace(_splits(_TEKKEN), ignore_merges=True, bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _splits(_GPT4O)),
    ("tiny_aya cohere2moe", _splits(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    ("jais-2", _splits(_JAIS2)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _splits(r"\p{N}{1,3}", _KANA, _DEEPSEEK3)),
    (
        "deepseek-llm",
        PreTokenizerRow(
            (*_splits(r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+$", _CHINESE).steps[:-1], *_DEEPSEEK_DIGITS)
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizerRow((*_splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE).steps[:-1], *_DEEPSEEK_DIGITS)),
    ),
    (
        "falcon",
        PreTokenizerRow(
            (Punctuation("contiguous"), _GPT2_RULE, Digits(False), Split(Regex("[0-9][0-9][0-9]"), "isolated"))
        ),
    ),
    ("bloom poro-chat gpt3-finnish", _splits(_BLOOM)),
    ("viking", PreTokenizerRow((Split(Regex(_BLOOM), "isolated"), Digits(individual_digits=True), _BYTES))),
    ("bailingmoe bailingmoe2 llada-moe", _splits(_BAILING)),
    ("seed-coder", _splits(_SEED)),
    ("ufakzeka", _splits(rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}")),
    ("laguna", _splits(r"[^\n]+|[\n]+", _QWEN2)),
    ("exaone-moe", _splits(_EXAONE_MOE)),
    (
        "chameleon",
        replace(
            _splits(
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            bos=True,
        ),
    ),
)

PRE_TOKENIZERS = {name: row for names, row in _FAMILIES for name in names.split()}
"""Name in `tokenizer.ggml.pre` -> the rule; without encoders, and rules that the tokenizers library cannot express."""
