import json

import pytest
import tokenizers
from helpers.onnx_members import BOS, EOS, VOCABULARY, byte_tokenizer, random_member, write_bundle
from tokenizers import decoders, models, normalizers

from edgemix.bundle.manifest import CHAT_TEMPLATE, TOKENIZER, TokenizerEntry
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime.text.detokenizer import IncrementalDecoder, StopStrings
from edgemix.runtime.text.tokenizer import Tokenizer

HARD = "Grüße, 世界! 👩‍👩‍👧 naïve \ufffd end"


def entry(**options):
    return TokenizerEntry(**{"sha256": "0" * 64, "vocabulary": VOCABULARY, "eos": (EOS,), **options})


def tokenizer(chat_template=None, **options):
    return Tokenizer(byte_tokenizer(), entry(**options), chat_template)


@pytest.fixture
def metaspace():
    """As Llama 2's: pieces that begin words, bytes for what is unknown, and a first space that is no text."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "Hello", "!"]
    core = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return Tokenizer(core, entry(vocabulary=len(pieces))), {piece: i for i, piece in enumerate(pieces)}


def test_encoding_starts_with_bos_only_where_the_family_does():
    assert tokenizer().encode("ab") == [97, 98]
    assert tokenizer(bos=BOS).encode("ab") == [BOS, 97, 98]
    assert tokenizer(bos=BOS).encode("ab", bos=False) == [97, 98]


def test_an_empty_text_is_refused_unless_there_is_a_bos():
    assert tokenizer(bos=BOS).encode("") == [BOS]
    with pytest.raises(InputError, match="empty"):
        tokenizer().encode("")


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(InputError, match="Unicode"):
        tokenizer().encode("a\ud800b")


def test_a_files_truncation_and_padding_are_ignored():
    core = byte_tokenizer()
    core.enable_truncation(3)
    core.enable_padding(length=10)
    assert Tokenizer(core, entry()).encode("abcdef") == list(b"abcdef")


def test_scored_bytes_leave_out_the_first_token():
    assert tokenizer().encode_for_scoring("abé") == ([97, 98, 195, 169], 3)
    assert tokenizer(bos=BOS).encode_for_scoring("abé") == ([BOS, 97, 98, 195, 169], 4)
    with pytest.raises(InputError, match="one token"):
        tokenizer().encode_for_scoring("a")


def test_incremental_decoding_gives_whole_characters_as_soon_as_they_are_whole():
    decoder = IncrementalDecoder(tokenizer(), list(b"x"))
    pieces = [decoder.add(byte) for byte in "é👩a".encode()]
    assert pieces == ["", "é", "", "", "", "👩", "a"]


def test_incremental_decoding_equals_decoding_at_once():
    decoder = IncrementalDecoder(tokenizer(), list("Prompt ü".encode()))
    assert "".join(decoder.add(byte) for byte in HARD.encode()) == HARD


def test_bytes_that_are_no_character_become_replacement_characters_once_that_is_certain():
    decoder = IncrementalDecoder(tokenizer(), list(b"x"))
    assert [decoder.add(byte) for byte in b"\xe4\xb8ab"] == ["", "", "\ufffda", "b"]


def test_an_unfinished_character_comes_at_the_end():
    decoder = IncrementalDecoder(tokenizer(), list(b"x"))
    assert "".join(decoder.add(byte) for byte in "ab👩".encode()[:-1]) == "ab"
    assert decoder.rest() == "\ufffd"


@pytest.mark.parametrize("unit", [b"\xff", "\ufffd".encode(), b"\xff\xf0\x9f"])
def test_long_runs_of_replacement_characters_are_shown_as_they_come(unit):
    """They were held as long as they lasted, and decoded again with each token."""
    decoder, run = IncrementalDecoder(tokenizer(), list(b"x")), unit * 60
    pieces = [decoder.add(byte) for byte in (*run, 97)]
    assert any(pieces[:80])
    assert "".join(pieces) + decoder.rest() == run.decode(errors="replace") + "a"


def test_an_invalid_byte_leaves_characters_that_were_shown(metaspace):
    """Byte fallback replaces all bytes of a run then, also those of characters that were shown before."""
    subject, ids = metaspace
    decoder = IncrementalDecoder(subject, [ids["▁Hello"]])
    pieces = [decoder.add(ids[f"<0x{byte:02X}>"]) for byte in b"\xc3\xa9\xff"]
    assert ("".join(pieces), decoder.rest()) == ("é", "\ufffd")


def test_special_tokens_are_no_text():
    decoder = IncrementalDecoder(tokenizer(), [BOS, 97])
    assert [decoder.add(token) for token in (BOS, 98, EOS, 99)] == ["", "b", "", "c"]


def test_the_space_before_a_word_survives(metaspace):
    """A decoder that strips a text's first space would lose it at the start of every continuation."""
    subject, ids = metaspace
    decoder = IncrementalDecoder(subject, [ids["▁Hello"]])
    assert [decoder.add(ids[piece]) for piece in ("▁world", "!", "▁Hello")] == [" world", "!", " Hello"]


def test_bytes_of_a_byte_fallback_tokenizer_become_characters(metaspace):
    subject, ids = metaspace
    decoder = IncrementalDecoder(subject, [ids["▁Hello"]])
    pieces = [decoder.add(ids[f"<0x{byte:02X}>"]) for byte in "é👩👧世".encode() * 3]
    assert "".join(pieces) == "é👩👧世" * 3
    assert [piece for piece in pieces if piece] == list("é👩👧世" * 3)


def test_a_prompt_that_ends_in_many_byte_tokens(metaspace):
    subject, ids = metaspace
    prompt = [ids["▁Hello"], *(ids[f"<0x{byte:02X}>"] for byte in "👩👧👩👧".encode())]
    decoder = IncrementalDecoder(subject, prompt)
    assert "".join(decoder.add(ids[f"<0x{byte:02X}>"]) for byte in "👧!".encode()) == "👧!"


def feed(stops, pieces):
    finder, shown = StopStrings(stops), []
    for piece in pieces:
        text, stopped = finder.add(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, finder.rest()], False


def test_a_stop_string_inside_a_piece():
    assert feed(["END"], ["one END two"]) == (["one "], True)


def test_a_stop_string_over_several_pieces_is_never_shown_in_part():
    assert feed(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], True)


def test_what_looked_like_a_stop_string_is_shown_when_it_is_not():
    assert feed(["END"], ["one EN", "EMY"]) == (["one ", "ENEMY", ""], False)
    assert feed(["END"], ["one EN"]) == (["one ", "EN"], False)
    assert feed(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], True)


def test_the_first_stop_string_in_the_text_wins():
    assert feed(["two", "one"], ["x one two"]) == (["x "], True)


def test_without_stop_strings_nothing_is_held_back():
    assert feed([], ["a", "b"]) == (["a", "b", ""], False)


TEMPLATE = """{{ bos_token }}{% for message in messages %}
[{{ message['role'] }}] {{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}
[assistant] {% endif %}"""


def rendered(subject, messages):
    return subject._core.decode(subject.render(messages), skip_special_tokens=False)


def test_chat_templates():
    subject = tokenizer(TEMPLATE, bos=BOS)
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]
    assert rendered(subject, messages) == "<s>[system] Be brief.\n[user] Hi\n[assistant] "
    assert subject.render(messages)[:2] != [BOS, BOS]


def test_chat_templates_know_what_hugging_faces_know():
    template = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}"
        "{%- if m.role == 'skip' -%}{%- continue -%}{%- endif -%}"
        "{%- set ns.n = ns.n + 1 -%}{% generation %}{{ m | tojson }}{% endgeneration %}{%- endfor -%}"
        "{{ ns.n }}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    messages = [{"role": "skip", "content": ""}, {"role": "user", "content": "<é>"}]
    assert rendered(tokenizer(template), messages) == '{"role": "user", "content": "<é>"}14True'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content }}",
        "{{ messages + 1 }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_is_an_input_error(template):
    with pytest.raises(InputError, match="chat template"):
        tokenizer(template).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"content": "x"}], [None], 5, "text"])
def test_messages_need_role_and_content(messages):
    with pytest.raises(InputError, match="role and content"):
        tokenizer(TEMPLATE).render(messages)


def test_without_a_template_there_is_no_chat():
    with pytest.raises(InputError, match="no chat template"):
        tokenizer().render([{"role": "user", "content": "x"}])


def test_a_damaged_tokenizer_is_a_bundle_error(tmp_path):
    bundle = write_bundle(tmp_path, {"a": random_member(0, tokens=VOCABULARY)}, chat_template="x")
    (bundle / CHAT_TEMPLATE).write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="tokenizer"):
        Tokenizer.load(bundle, entry())
    (bundle / CHAT_TEMPLATE).unlink()
    with pytest.raises(BundleError, match="258 token ids, the manifest says 9"):
        Tokenizer.load(bundle, entry(vocabulary=9, eos=()))
    (bundle / TOKENIZER).write_text("{}")
    with pytest.raises(BundleError, match="tokenizer"):
        Tokenizer.load(bundle, entry())


def panicking(part):
    """A tokenizer on which the tokenizers library panics, which no `except Exception` catches."""
    parsed = json.loads(byte_tokenizer().to_str())
    if part == "decode":
        parsed["decoder"] = {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}
    else:
        parsed["model"] = {"type": "Unigram", "unk_id": None, "vocab": []}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parsed)), entry())


def test_a_failure_of_the_library_on_one_text_is_an_error_of_that_text():
    decodes, encodes = panicking("decode"), panicking("encode")
    with pytest.raises(EdgemixError, match="fails on these tokens: PanicException"):
        decodes.decode([97])
    assert decodes.encode("b") == [98]
    with pytest.raises(EdgemixError, match="fails on this text"):
        encodes.encode("hello")


def test_a_tokenizer_whose_building_panics_is_a_bundle_error(tmp_path):
    bundle = write_bundle(tmp_path, {"a": random_member(0, tokens=VOCABULARY)})
    parsed = json.loads((bundle / TOKENIZER).read_bytes())
    parsed["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}
    (bundle / TOKENIZER).write_text(json.dumps(parsed))
    with pytest.raises(BundleError, match="PanicException"):
        Tokenizer.load(bundle, entry())
