"""The answers of a bundle to lm-evaluation-harness, against closed forms."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from helpers.onnx_members import BOS, EOS, VOCABULARY, mixed, random_member, saying, write_bundle

from edgemix.errors import InputError
from edgemix.runtime import Mixture

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def model():
    """Return a function that makes the harness's model of a bundle and other model_args."""
    from edgemix.cli.lm_eval.model import MixtureLM

    return lambda bundle, **arguments: MixtureLM(bundle=str(bundle), provider="cpu", threads=1, **arguments)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.mark.parametrize("mix", [{}, {"weights": "adaptive"}, {"combine": "log-linear"}, {"weights": "programs"}])
def test_loglikelihood(model, bundle, mix):
    adapter, pairs = model(bundle, **mix), [("1+", "2=3"), ("d", "e"), ("1+2 ", "x"), ("1+", "x"), ("d", "ef x")]
    with Mixture.load(bundle, provider="cpu", threads=1) as mixture:
        for (context, text), (total, greedy) in zip(
            pairs, adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True), strict=True
        ):
            # A space at a context's end belongs to what follows.
            count = len(text) + len(context) - len(context.rstrip())
            expected = mixture.score(context + text, **mix).log_probabilities[-count:].sum()
            assert total == pytest.approx(expected, abs=1e-4)
            if mix.get("weights") == "programs":
                assert greedy == (context == "d")


def test_an_empty_context_becomes_a_special_token(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY)
    for bos, before in ((None, EOS), (BOS, BOS)):
        adapter = model(write_bundle(tmp_path / str(bos), {"a": form}, bos=bos))
        expected = mixed([form], [1.0], [before, *b"def"]).sum()
        ((total, _),) = adapter.loglikelihood(requests("loglikelihood", ("", "def")), disable_tqdm=True)
        assert total == pytest.approx(expected, abs=1e-4)


def test_long_contexts_are_truncated_from_the_left(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY, context=8)
    adapter = model(write_bundle(tmp_path / "bundle", {"a": form}))
    instances = requests("loglikelihood", ("abcdefghijkl", "mn"))
    ((total, _),) = adapter.loglikelihood(instances, disable_tqdm=True)
    assert total == pytest.approx(mixed([form], [1.0], [*b"fghijklmn"])[-2:].sum(), abs=1e-4)
    with pytest.raises(InputError, match="9 tokens, more than the 8"):
        adapter.loglikelihood(requests("loglikelihood", ("a", "bcdefghij")), disable_tqdm=True)


def test_rolling_windows_score_each_token_once(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY, context=8)
    adapter = model(write_bundle(tmp_path / "bundle", {"a": form}))
    text, other = b"abcdefghijkl", b"xyz"
    windows = [([EOS, *text[:8]], 8), ([*text[3:]], 4)]  # the last one has all the context there is room for
    expected = sum(mixed([form], [1.0], ids)[-count:].sum() for ids, count in windows)
    found = adapter.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text.decode(),), ("",), (other.decode(),)), disable_tqdm=True
    )
    np.testing.assert_allclose(found, [expected, 0, mixed([form], [1.0], [EOS, *other]).sum()], atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_generate_until(model, bundle, batch_size):
    adapter = model(bundle, weights="numbers", batch_size=batch_size)
    instances = requests(
        "generate_until",
        ("1", {"until": ["="]}),
        ("1+", {"until": ["zz"], "max_gen_toks": 4}),
        ("2", {"until": ["="], "max_gen_toks": 1}),
        ("1+2", {"until": ["="]}),
        ("+", {"until": ["="]}),
    )
    assert adapter.generate_until(instances, disable_tqdm=True) == ["+2", "2=3", "", "", "2"]


def test_prompts_are_truncated_to_leave_room_for_new_tokens(model, tmp_path):
    adapter = model(write_bundle(tmp_path / "bundle", {"a": saying("abcdefgh", context=8)}))
    instances = requests("generate_until", ("xxxxxxxxxxxxxxxxab", {"max_gen_toks": 5}))
    assert adapter.generate_until(instances, disable_tqdm=True) == ["cdefg"]
    with pytest.raises(InputError, match="8 tokens to generate leave no room"):
        adapter.generate_until(requests("generate_until", ("x", {"max_gen_toks": 8})), disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_are_repeatable(model, bundle, batch_size):
    adapter = model(bundle, batch_size=batch_size)
    instances = requests("generate_until", *[("1+", {"do_sample": True, "temperature": 9.0, "max_gen_toks": 12})] * 3)
    texts, again = (adapter.generate_until(instances, disable_tqdm=True) for _ in range(2))
    assert texts == again
    assert len(set(texts)) == 3


def test_the_student_alone(model, student_bundle):
    """It learned half of the text of "math", so it is certain in that half only."""
    pairs = requests("loglikelihood", ("1", "+2"), ("2", "="))
    (known, greedy), (unknown, _) = model(student_bundle, student=True).loglikelihood(pairs, disable_tqdm=True)
    assert greedy
    assert known == pytest.approx(0, abs=0.01)
    assert unknown < math.log(0.1)


def test_texts_begin_with_one_beginning_of_text_token(model, tmp_path):
    adapter = model(write_bundle(tmp_path / "bundle", {"a": saying("ab")}, bos=BOS))
    assert adapter.tok_encode("a") == [BOS, ord("a")]
    assert adapter.tok_encode("<s>a") == [BOS, ord("a")]
    assert adapter.tok_encode("a", add_special_tokens=False) == [ord("a")]
    assert (adapter.tok_encode(""), adapter.tok_encode("", add_special_tokens=False)) == ([BOS], [])


def test_chats(model, tmp_path):
    template = (
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}[{{ m.role }}]{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    adapter = model(write_bundle(tmp_path / "bundle", {"a": saying("ab")}, chat_template=template))
    instances = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert adapter.apply_chat_template(instances) == "[user]Hi\n[assistant]"
    begun = [*instances, {"role": "assistant", "content": "Well, "}]
    assert adapter.apply_chat_template(begun, add_generation_prompt=False) == "[user]Hi\n[assistant]Well, "
    assert (adapter.chat_template(True), adapter.chat_template(False)) == (template, None)

    plain = model(write_bundle(tmp_path / "plain", {"a": saying("ab")}))
    assert plain.tokenizer_name != adapter.tokenizer_name
    with pytest.raises(InputError, match="no chat template"):
        plain.chat_template(True)
