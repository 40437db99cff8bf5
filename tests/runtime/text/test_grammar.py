"""Constrained texts: exactly the mixture's distribution over those texts, however they are generated."""

import json
import re
import sys
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import tokenizers
from helpers.cut_students import cut_student
from helpers.onnx_members import EOS, VOCABULARY, ClosedForm, random_member, saying, write_bundle

from edgemix.bundle.manifest import TokenizerEntry
from edgemix.errors import EdgemixError, InputError
from edgemix.runtime import Mixture
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.speculative import SpeculativeDecoding
from edgemix.runtime.text.grammar import Constraint, Grammar
from edgemix.runtime.text.json_schema import schema_text
from edgemix.runtime.text.tokenizer import Tokenizer

WEIGHTS = {"shared": 0.7, "growing": 0.3}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS = [{"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}, {"regex": "(ab|[c-f]{2,5})+x"}]
PROMPT = "Who is it? "
TEXTS = ["g", "ge", "eg", "ege", "j"]


@pytest.fixture(scope="module")
def drafted(tmp_path_factory, pair_forms):
    """The mixture of `pair_forms` with a student that resembles it."""
    return Mixture.load(_bundle(tmp_path_factory, pair_forms), provider="cpu", threads=1)


@pytest.fixture(scope="module", params=["all tokens", "some tokens"])
def drafting(request, drafted, tmp_path_factory, pair_forms):
    """The same, and where the student drafts some tokens only."""
    if request.param == "all tokens":
        return drafted
    folder = cut_student(_bundle(tmp_path_factory, pair_forms), sorted({*b'{"nam":0123 abdge', EOS}))
    return Mixture.load(folder, provider="cpu", threads=1)


def _bundle(tmp_path_factory, pair_forms):
    student = ClosedForm(random_member(1, tokens=VOCABULARY).table * 0.7, pull=2.0)
    return write_bundle(tmp_path_factory.mktemp("drafted") / "bundle", pair_forms, weights=WEIGHTS, student=student)


def following(members, text, allowed):
    """The constrained mixture's distribution [VOCABULARY] of the next token, from closed forms."""
    shares = sum(
        weight * np.exp(member.log_probabilities(text)[-1])
        for weight, member in zip(WEIGHTS.values(), members.values(), strict=True)
    )
    shares = np.where(np.isin(np.arange(VOCABULARY), allowed), shares, 0)
    return shares / shares.sum()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_text_satisfies_the_constraint_and_ends(drafted, constraint):
    found = drafted.generate(PROMPT, max_new_tokens=200, **constraint)
    assert found.finish_reason == "stop"
    assert found.token_ids[-1] == EOS
    if "regex" in constraint:
        assert found.text.endswith("x")
    else:
        assert json.loads(found.text).keys() == {"name", "age"}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "options", [{}, {"weights": "adaptive"}, {"combine": "log-linear"}, {"repetition_penalty": 1.4}]
)
@pytest.mark.parametrize("constraint", CONSTRAINTS[::2])
def test_speculative_decoding_gives_the_text_of_plain_decoding(drafting, constraint, options):
    plain = drafting.generate(PROMPT, max_new_tokens=60, speculation="off", **constraint, **options)
    for speculation in ("auto", "lookup", "student"):
        fast = drafting.generate(PROMPT, max_new_tokens=60, speculation=speculation, **constraint, **options)
        assert fast.token_ids == plain.token_ids
        np.testing.assert_allclose(fast.log_probabilities, plain.log_probabilities, atol=1e-4)


def test_the_most_probable_token_is_taken_after_averaging(drafted, pair_forms):
    """By hand: of the two texts, token by token, the one that the averaged distribution prefers."""
    found = drafted.generate(PROMPT, choices=["ax", "bx"])
    text = [*PROMPT.encode()]
    assert found.token_ids[0] == following(pair_forms, text, [*b"ab"]).argmax()
    expected = [member.log_probabilities(text)[-1][found.token_ids[0]] for member in pair_forms.values()]
    mixed = np.log(np.dot(list(WEIGHTS.values()), np.exp(expected)))
    np.testing.assert_allclose(found.log_probabilities[0], mixed, atol=1e-4)  # before the constraint


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("speculation", ["off", "auto", "student"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_texts_have_the_constrained_distribution(drafted, pair_forms, speculation, temperature):
    """Chi-square over all texts that the constraint allows, the end of text included: "g" may end or go on to "ge"."""
    draws = 320
    options = {"choices": TEXTS, "temperature": temperature, "speculation": speculation}
    seen = Counter(drafted.generate(PROMPT, seed=seed, **options).text for seed in range(draws))
    check_counts(seen, pair_forms, temperature, draws)


@pytest.mark.usefixtures("eager")
def test_drawn_texts_of_drafts_have_the_constrained_distribution(drafting, pair_forms):
    """As above; what is drawn with a seed by `generate` is not drafted. One student cannot draft "j"."""
    draws, eos = 600, drafting.manifest.tokenizer.eos
    grammar = Grammar(Constraint(choices=TEXTS), drafting.tokenizer)
    seen, drafts = Counter(), Counter()
    for seed in range(draws):
        decoding = SpeculativeDecoding(
            drafting.ensemble(), [*PROMPT.encode()], Sampling(temperature=0.7), seed=seed, max_new_tokens=9, context=99,
            eos=eos, student=drafting.drafting, lookup=False, grammar_state=grammar.follow(),
        )  # fmt: skip
        text = []
        while new := decoding.step():
            text += [token.id for token in new if token.id not in eos]
        seen[bytes(text).decode()] += 1
        drafts += Counter(drafted=decoding.drafted, accepted=decoding.accepted)
        decoding.close()
    check_counts(seen, pair_forms, 0.7, draws)
    assert 0 < drafts["accepted"] < drafts["drafted"]


def check_counts(seen, pair_forms, temperature, draws):
    chance = {}
    for text in TEXTS:
        ids, likely = [*PROMPT.encode()], 1.0
        for place, token in enumerate([*text.encode(), EOS]):
            begun = [each for each in TEXTS if each.startswith(text[:place])]
            allowed = {each.encode()[place] if len(each) > place else EOS for each in begun}
            shares = following(pair_forms, ids, [*allowed]) ** (1 / temperature)
            likely *= shares[token] / shares.sum()
            ids.append(token)
        chance[text] = likely
    assert sum(chance.values()) == pytest.approx(1)
    expected = np.array([chance[text] * draws for text in TEXTS])
    assert expected.min() > 50, "chi-square's distribution is for counts that are not small"
    square = ((np.array([seen[text] for text in TEXTS]) - expected) ** 2 / expected).sum()
    assert square < 23.5, (seen, chance)  # the 99.99% quantile with 4 degrees of freedom


def test_a_token_that_is_forced_costs_no_call(drafted, monkeypatch):
    asked = []
    finish = SpeculativeDecoding.close
    monkeypatch.setattr(SpeculativeDecoding, "close", lambda self: (asked.append(self.calls), finish(self)))
    found = drafted.generate(PROMPT, choices=["a long text that can only be this one", "b"], max_new_tokens=64)
    assert len(found.token_ids) in (38, 2)
    assert asked[0] <= 2, "only the first token is in doubt"


def test_batches_and_servers_hold_texts_to_their_form(drafted):
    prompts = ["One", "Two of them", "3"]
    alone = [drafted.generate(prompt, json_schema=SCHEMA, speculation="off").text for prompt in prompts]
    assert [each.text for each in drafted.generate(prompts, json_schema=SCHEMA)] == alone
    with drafted.serve(most=2) as server:
        constraints = [{"json_schema": SCHEMA}, {"choices": ["yes", "no"]}, {"json_schema": SCHEMA}]
        handles = [server.submit(prompt, **constraint) for prompt, constraint in zip(prompts, constraints, strict=True)]
        found = [handle.result().text for handle in handles]
    assert [found[0], found[2]] == [alone[0], alone[2]]
    assert found[1] in ("yes", "no")


def test_a_seed_draws_the_same_alone_and_in_a_batch(drafted):
    options = {"json_schema": SCHEMA, "temperature": 1.0, "seed": 5}
    together = drafted.generate(["a", "b"], **options)
    assert together[1].text == drafted.generate("b", **options).text


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_what_no_member_believes_is_still_ordered(mixture_of, speculation):
    """Regression: probabilities that float32 cannot hold are all zero, and then the first token of all would win."""
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    table[:, ord("z")] = 300
    table[:, ord("b")] = 20
    mixture = mixture_of({"one": ClosedForm(table), "other": ClosedForm(table)})
    assert mixture.generate("q", choices=["a", "b", "c"], speculation=speculation).text == "b"


def test_a_text_that_is_cut_short_is_a_beginning(mixture_of):
    found = mixture_of({"one": saying("abc")}).generate("a", regex="[b-c]{8}", max_new_tokens=3)
    assert (found.finish_reason, len(found.text)) == ("length", 3)


def test_characters_of_several_tokens(mixture_of):
    found = mixture_of({"one": random_member(3, tokens=VOCABULARY)}).generate("a", choices=["né\n", "ñ\"'\\"])
    assert found.text in ("né\n", "ñ\"'\\")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a["}, "unclosed character class|invalid regex"),
        ({"json_schema": {"type": "bogus"}}, "bogus"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": {"type": object()}}, "not JSON"),
        ({"json_schema": "true"}, "JSON object"),
        ({"json_schema": {"$ref": "#"}}, "no text"),
        ({"regex": r"[^\s\S]"}, "no text"),
        ({"regex": "a\udcff"}, "valid Unicode"),
        ({"regex": 5}, "valid Unicode"),
        ({"choices": ["a\udcff"]}, "valid Unicode"),
        ({"choices": 5}, "must be texts"),
        ({"choices": []}, "at least one"),
        ({"choices": "yes"}, "must be texts"),
        ({"choices": ["yes", ""]}, "none of them empty"),
        ({"choices": ["yes"], "regex": "no"}, "regex and choices both"),
    ],
)
def test_an_invalid_constraint_is_refused_at_once(drafted, constraint, message):
    for call in (drafted.generate, drafted.stream):
        with pytest.raises(InputError, match=message):
            call("a", **constraint)
    with drafted.serve() as server, pytest.raises(InputError, match=message):
        server.submit("a", **constraint)


@pytest.mark.parametrize("name", ["password", "file-path", "base64url", "json-pointer", "regex", "no-such-format"])
def test_an_unknown_format_of_a_schema_is_an_annotation(drafted, name):
    """As JSON schema has it; pydantic's FilePath and SecretStr have such formats (jsonschema 638)."""
    part = {"anyOf": [{"enum": ["a", "b"], "format": name}]}
    schema = {"type": "object", "properties": {"x": part}, "required": ["x"], "additionalProperties": False}
    assert json.loads(drafted.generate(PROMPT, json_schema=schema).text)["x"] in ("a", "b")


def test_a_format_is_left_out_where_it_is_a_keyword_only():
    known = {"type": "string", "format": "date"}
    kept = {
        "properties": {"format": {"type": "string"}, "d": known},
        "const": {"format": "zip"},
        "enum": [{"format": "zip"}],
        "default": {"format": "zip"},
        "examples": [{"format": "zip"}],
    }
    given = {**kept, "items": [{"format": "zip"}], "not": {"format": "zip"}, "$defs": {"format": {"format": "zip"}}}
    given |= {"components": {"schemas": {"X": {"format": "zip"}}}}  # where a $ref of OpenAPI points
    expected = {**kept, "items": [{}], "not": {}, "$defs": {"format": {}}, "components": {"schemas": {"X": {}}}}
    assert json.loads(schema_text(given)) == expected


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"\bfoo"}, "look-around, word boundaries included, is not supported"),
        ({"regex": "("}, "the expression '(': unclosed group"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "schema: look-around"),
    ],
)
def test_a_refusal_says_why(drafted, constraint, message):
    """Not the first line of a parser's report."""
    with pytest.raises(InputError, match=re.escape(message)):
        drafted.generate(PROMPT, **constraint)


def _nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": _nested(400)},
        {"json_schema": {"properties": {f"p{index}": {"type": "string"} for index in range(20_000)}}},
        {"json_schema": {"enum": [f"v{index}" for index in range(60_000)]}},
        {"json_schema": {"type": "string", "minLength": 10**9}},
        {"json_schema": {"type": "array", "minItems": 10**9}},
        {"json_schema": {"type": "integer", "minimum": 10**300}},
        {"json_schema": {"$ref": "#"}},
        {"regex": "a{1,1000000000}b"},
        {"regex": "((a{1,999}){1,999}){1,999}b"},
        {"regex": "(" * 2000 + "a" + ")" * 2000},
        {"choices": ["a" * 1_000_000]},
    ],
    ids=lambda constraint: str(constraint)[:40],
)
def test_a_hostile_constraint_ends_soon(drafted, constraint):
    """With a text that follows it, or an error."""
    begun = time.monotonic()
    with suppress(EdgemixError):
        drafted.generate(PROMPT, max_new_tokens=4, **constraint)
    assert time.monotonic() - begun < 20  # well under 1 s each on a machine of its own


def test_without_the_library_the_remedy_is_told(drafted, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EdgemixError, match="llguidance") as caught:
        drafted.generate("a", regex="b")
    assert "edgemix[constrained]" in caught.value.remedy


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_what_looks_like_a_special_token_is_text(drafted, speculation):
    """Regression: the end of text was taken for the spelling of "</s>", and ended the text in its middle."""
    for text in ("ab</s>c", "ab<s>c", "x\x7fy"):
        found = drafted.generate("a", choices=[text], speculation=speculation)
        assert (found.text, found.finish_reason) == (text, "stop")
    assert json.loads(drafted.generate("a", json_schema={"const": "x</s>y"}, speculation=speculation).text) == "x</s>y"


def test_forced_text_may_be_spelled_in_any_way():
    """The mask is all tokens that can go on, not only the tokenizer's own spelling."""
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [("a", "b"), ("ab", "c")])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(core, TokenizerEntry(sha256="0" * 64, vocabulary=6, eos=(5,), bos=None))
    grammar_state = Grammar(Constraint(choices=["abc"]), tokenizer).follow()
    assert set(np.flatnonzero(grammar_state.allowed())) == {0, 3, 4}
    assert grammar_state.expected() == [4]
    assert set(np.flatnonzero(grammar_state.allowed([0, 1]))) == {2}
    assert [grammar_state.valid(tokens) for tokens in ([4, 5], [0, 1, 2, 5], [3, 0], [5])] == [2, 4, 1, 0]


def test_a_follower_can_look_ahead_and_come_back(drafted):
    grammar_state = Grammar(Constraint(regex="abc|abd|x+"), drafted.tokenizer).follow()
    a, b, c, d, x = b"abcdx"
    assert set(np.flatnonzero(grammar_state.allowed([a, b]))) == {c, d}
    assert set(np.flatnonzero(grammar_state.allowed())) == {a, x}
    assert set(np.flatnonzero(grammar_state.allowed([x]))) == {x, EOS}
    assert grammar_state.valid([a, b, x]) == 2
    grammar_state.take([a])
    assert set(np.flatnonzero(grammar_state.allowed())) == {b}
    grammar_state.take([b, d])
    assert set(np.flatnonzero(grammar_state.allowed())) == {EOS}
