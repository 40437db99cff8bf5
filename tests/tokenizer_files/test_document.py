"""What a tokenizer.json may hold: the kinds that models use pass, and what has no bound in native code is refused."""

import base64
import json
import struct

import pytest
import tokenizers
from helpers.onnx_members import byte_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgemix.errors import InputError
from edgemix.tokenizer_files.document import check_document, checked_text, read_document
from edgemix.tokenizer_files.pattern import check_pattern


def charsmap(size, blob=b"", units=b"\0\0\0\0"):
    return base64.b64encode(struct.pack("<I", size) + units + blob).decode()


def gpt2():
    core = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=True))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.post_processor, core.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    return core


def llama2():
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    core = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return core


def t5():
    core = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.5), ("a", -2.0)], 0, False))
    replacement = b"A" * 33 + b"\0"  # the longest of SentencePiece's nmt_nfkc
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Precompiled(base64.b64decode(charsmap(4, replacement))),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.decoder = decoders.Metaspace()
    return core


def bert():
    core = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor, core.decoder = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)), decoders.WordPiece()
    return core


@pytest.mark.parametrize("make", [byte_tokenizer, gpt2, llama2, t5, bert])
def test_tokenizers_of_models_pass_and_stay_the_same(make, tmp_path):
    core = make()
    core.add_special_tokens(["<|end|>"])
    core.enable_truncation(3)
    core.save(str(tmp_path / "tokenizer.json"))
    core.no_truncation()
    checked = tokenizers.Tokenizer.from_str(checked_text(tmp_path / "tokenizer.json"))
    assert json.loads(checked.to_str()) == json.loads(core.to_str())


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+(?!\S)|\s+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}]+[\r\n]*""",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]",
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+",
        r" ?[^(\s|[.,!?…。、।،])]+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
        r"[一-龥ࠀ-一가-퟿]+",
        r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]",
    ],
)
def test_expressions_of_models_pass(pattern):
    check_pattern(pattern)


EXPRESSIONS = [
    *(
        "(a+)+$",
        "(a|aa)+$",
        "(x+x+)+y",
        "(?:a?){40}a{40}",
        "a?" * 40 + "a" * 40,
        r"\s*\s*x",
        r"a*(b*c)",
        r"(a*|b)(c|d*)e",
        "a{0,99}a*b",
        "(?=(a+)+b)",
    ),
    *("((a|b)+|c)d", "a{99999}", "((a{99}){99}){99}", "(?:a{3}b{3}){500}" * 50, "[", "(" * 500, r"\1", "(?~a)", "a)"),
    *(r"(?<n>a\g<n>)", "(?x)a #(", "a{2}{3}", ""),
]


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_expressions_that_may_take_exponential_time_are_refused(pattern):
    with pytest.raises(ValueError, match=r"\w"):
        check_pattern(pattern)


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": [*parts]}


def template(**changes):
    token = {"id": "<s>", "ids": [256], "tokens": ["<s>"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    base = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<s>": token}}
    return base | changes


HOSTILE = {
    "empty pattern": ({"normalizer": replace("x", String="")}, "Replace: pattern"),
    "exponential pattern": ({"normalizer": replace("x", Regex="(a+)+$")}, "Replace: a group is repeated"),
    "exponential split": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)+b"}, "behavior": "Isolated", "invert": False}},
        "Split: a group is repeated",
    ),
    "doubling": ({"normalizer": sequence(*[replace("aa", String="a")] * 30)}, "times as long"),
    "doubling decoder": (
        {"decoder": {"type": "Sequence", "decoders": [replace("aa", String="a")] * 30}},
        "decoder may make a text",
    ),
    "doubling bytes": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 30}},
        "times as long",
    ),
    "long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "prepend must be a text of 0 to"),
    "many parts": ({"normalizer": sequence(*[{"type": "NFC"}] * 300)}, "at most 256"),
    "unknown part": ({"normalizer": {"type": "Exec"}}, "of the kind 'Exec'"),
    "charsmap beyond its end": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "trie should have 4,294,967,295 bytes",
    ),
    "charsmap of long replacements": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(4, b"a" * 9999)}},
        "times as long",
    ),
    "repeating template": (
        {"post_processor": template(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 2)},
        "repeats the text",
    ),
    "long special token": (
        {"post_processor": template(special_tokens={"<s>": {"id": "<s>", "ids": [1] * 99, "tokens": ["<s>"]}})},
        "at most 64 ids",
    ),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length must be a number"),
    "negative id": ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "has the id -1"),
    "huge id": ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, "has the id 2147483648"),
    "huge added id": ({"added_tokens": [{"id": 2**31, "content": "<s>"}]}, "has the id"),
    "dropout": ({"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}}, "dropout"),
    "long words": ({"model": {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 10**9}}, "max_input_chars"),
    "long pieces": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 999, 0.0]]}}, "more than 256"),
    "unknown piece": ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}, "unk_id"),
    "unknown model": ({"model": {"type": "Other", "vocab": {}}}, "of the kind 'Other'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_has_no_bound_in_native_code_is_refused(name):
    """Such files aborted the process, hung it, took gigabytes, or raised a panic, which is no Exception."""
    changes, words = HOSTILE[name]
    document = json.loads(byte_tokenizer().to_str()) | changes
    with pytest.raises(InputError, match=words):
        check_document(document)


@pytest.mark.parametrize(
    "text",
    ['{"version": ' + "[" * 5_000 + "]" * 5_000 + "}", '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": NaN}', "[]", b"\xff"],
    ids=["deep", "infinite", "surrogate", "nan", "list", "bytes"],
)
def test_what_is_not_json_is_refused(text):
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        read_document(text)


def test_what_is_built_is_what_was_checked(tmp_path):
    """Parsers differ in which of two equal keys they take."""
    twice = byte_tokenizer().to_str().replace('"normalizer":null', '"normalizer":{"type":"Exec"},"normalizer":null')
    (tmp_path / "tokenizer.json").write_text(twice)
    assert "Exec" in twice
    assert "Exec" not in checked_text(tmp_path / "tokenizer.json")
