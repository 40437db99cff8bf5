"""Text from the one object that apps embed, against closed forms."""

import itertools
import threading
from unittest.mock import Mock

import numpy as np
import pytest
from helpers.onnx_members import BOS, EOS, VOCABULARY, ClosedForm, mixed, random_member, saying, write_bundle

from edgemix.errors import InputError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs.shared_cache import SharedCache
from edgemix.runtime.options import GenerateOptions
from edgemix.runtime.text.completion import CompletionBuilder

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def same_completions(one, other):
    assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


def test_a_completion_is_what_the_model_says(mixture_of):
    done = mixture_of({"a": saying("Zwölf👩")}).generate("Z")
    assert done.text == "wölf👩"
    assert done.token_ids == (*"wölf👩".encode(), EOS)
    assert done.finish_reason == "stop"
    assert done.prompt_tokens == 1
    assert done.log_probabilities.shape == (len(done.token_ids),)
    assert np.all(done.log_probabilities > -0.1)
    assert done.timings.ttft > 0
    assert done.timings.decode_rate == pytest.approx(1 / done.timings.tpot)


def test_log_probabilities_are_the_mixtures(pair, pair_forms):
    prompt = "some text"
    done = pair.generate(prompt, max_new_tokens=12, temperature=1.5, top_k=40, seed=3)
    ids = [*prompt.encode(), *done.token_ids]
    expected = mixed(pair_forms.values(), [0.7, 0.3], ids)[len(prompt) - 1 :]
    np.testing.assert_allclose(done.log_probabilities, expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 11}, {"combine": "log-linear"}])
def test_a_ragged_batch_gives_the_single_results(pair, options):
    prompts = ["a", "a much longer prompt than the others", "middling"]
    together = pair.generate(prompts, max_new_tokens=10, **options)
    for prompt, done in zip(prompts, together, strict=True):
        same_completions(done, pair.generate(prompt, max_new_tokens=10, **options))


def test_a_list_of_one_or_none_is_still_a_list(pair):
    assert len(pair.generate(["a"], max_new_tokens=1)) == 1
    assert pair.generate([]) == []


def test_a_seed_makes_sampling_repeatable(pair):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    same_completions(pair.generate("x", seed=1, **options), pair.generate("x", seed=1, **options))
    assert pair.generate("x", seed=1, **options).text != pair.generate("x", seed=2, **options).text
    assert pair.generate("x", **options).text != pair.generate("x", **options).text


def test_one_seed_a_prompt(pair):
    one, two, again = pair.generate(["x"] * 3, max_new_tokens=20, temperature=1.0, seed=[1, 2, 1])
    same_completions(one, again)
    assert one.text != two.text


def test_max_new_tokens_and_the_context_end_a_text(mixture_of):
    mixture = mixture_of({"a": random_member(0, tokens=VOCABULARY, context=8)})
    done = mixture.generate("abc", max_new_tokens=2)
    assert (len(done.token_ids), done.finish_reason) == (2, "length")
    done = mixture.generate("abc", max_new_tokens=50)
    assert (len(done.token_ids), done.finish_reason) == (6, "length")
    with pytest.raises(InputError, match="9 tokens, more than the context of 8"):
        mixture.generate("abcdefghi")
    with pytest.raises(InputError, match="prompt 2"):
        mixture.generate(["a", "abcdefghi"])


def test_an_empty_prompt_needs_a_beginning_of_text(mixture_of, pair):
    with pytest.raises(InputError, match="empty"):
        pair.generate("")
    mixture = mixture_of({"a": random_member(0, tokens=VOCABULARY)}, bos=BOS)
    assert mixture.generate("", max_new_tokens=1).prompt_tokens == 1


def test_stop_strings(mixture_of):
    mixture = mixture_of({"a": saying("One two!")})
    done = mixture.generate("O", stop="tw")
    assert (done.text, done.finish_reason) == ("ne ", "stop")
    assert done.token_ids == tuple(b"ne tw")
    assert mixture.generate("O", stop=["xyz", "o!"]).text == "ne tw"
    assert mixture.generate("O", stop="!?").text == "ne two!"


def test_a_stop_string_ends_one_sequence_of_a_batch(mixture_of):
    first, second = mixture_of({"a": saying("One two!")}).generate(["O", "e"], stop="ne")
    assert (first.text, second.text) == ("", " two!")


def following(*ids):
    """A member over the byte tokenizer that says each id after the one before it, with near certainty."""
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    for before, after in itertools.pairwise(ids):
        table[before, after] = 12.0
    return ClosedForm(table)


@pytest.mark.parametrize("said", [b"ok\xef\xbf\xbd", b"ok\xe4\xb8", b"\xff"], ids=["U+FFFD", "incomplete", "invalid"])
def test_text_is_that_of_the_token_ids_to_its_end(mixture_of, said):
    """A final U+FFFD, or the bytes of an incomplete character, was left out."""
    mixture = mixture_of({"a": following(97, *said, EOS)})
    expected = said.decode(errors="replace")
    for options in ({}, {"max_new_tokens": len(said)}, {"stop": "zz"}, {"stop": f"{expected}z"}):
        single, (_, batched) = mixture.generate("a", **options), mixture.generate(["a", "a"], **options)
        assert single.text == batched.text == mixture.tokenizer.decode(single.token_ids) == expected
    assert "".join(chunk.text for chunk in mixture.stream("a")) == expected
    with mixture.serve() as server:
        assert server.submit("a").result().text == expected
    assert mixture.generate("a", stop=expected).text == ""


@pytest.mark.parametrize(
    ("stop", "text"), [("<s>", "bc"), ("c<s>", "b"), ("<s>d", "bc"), ("d</s>", "bc"), ("<s>x", "bcd"), ("cd", "bcd")]
)
def test_stop_strings_match_special_tokens(mixture_of, stop, text):
    """They never matched, as they were compared with the text without special tokens (vllm 2123)."""
    mixture = mixture_of({"a": following(97, 98, 99, BOS, 100, EOS)})
    single, (_, batched) = mixture.generate("a", stop=stop), mixture.generate(["a", "a"], stop=stop)
    assert single.text == batched.text == "".join(chunk.text for chunk in mixture.stream("a", stop=stop)) == text
    with mixture.serve() as server:
        assert server.submit("a", stop=stop).result().text == text


def test_a_token_that_a_member_has_no_row_for_has_no_probability(mixture_of):
    """A tokenizer with more tokens than a model has rows was refused (llama.cpp 6111, transformers 24899)."""
    wide = ClosedForm(np.pad(random_member(2, tokens=VOCABULARY).table, ((0, 2), (0, 2)), constant_values=20.0))
    forms = {"narrow": random_member(1, tokens=VOCABULARY, pull=6.0), "wide": wide}
    mixture = mixture_of(forms, added=["[PAD]"], student=random_member(1, tokens=VOCABULARY))
    pad = VOCABULARY
    with pytest.raises(InputError, match=r"'\[PAD\]', which not every member has"):
        mixture.generate("a[PAD]b")
    found = mixture.next_token_distribution("ab")
    parts = [form.logits([97, 98])[-1, :VOCABULARY] for form in forms.values()]
    expected = sum(np.exp(part) / np.exp(part).sum() / 2 for part in parts)
    assert found[pad] == 0
    np.testing.assert_allclose(found[:pad], expected, atol=1e-6)
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"regex": "[a-d]{9}"}, {"combine": "log-linear"}):
        plain = mixture.generate("a", max_new_tokens=20, speculation="off", **options)
        same_completions(plain, mixture.generate("a", max_new_tokens=20, **options))
        same_completions(plain, mixture.generate(["a", "bcd"], max_new_tokens=20, **options)[0])
        assert max(plain.token_ids) < pad
    ids = [*b"some text"]
    rows = [np.array([form.logits(ids)[i, :VOCABULARY] for i in range(len(ids) - 1)]) for form in forms.values()]
    shares = [np.exp(row) / np.exp(row).sum(-1, keepdims=True) for row in rows]
    scored = sum(np.log(sum(share[i, ids[i + 1]] for share in shares) / 2) for i in range(len(ids) - 1))
    assert mixture.score("some text").perplexity == pytest.approx(np.exp(-scored / (len(ids) - 1)), rel=1e-4)


def test_weights_can_be_given_per_call(pair, pair_forms):
    for name, domain in (("shared", "first"), ("growing", "second")):
        by_name = pair.next_token_distribution("xyz", weights={name: 2.0})
        np.testing.assert_allclose(by_name, np.exp(pair_forms[name].log_probabilities(list(b"xyz"))[-1]), atol=1e-6)
        np.testing.assert_array_equal(by_name, pair.next_token_distribution("xyz", weights=domain))
        same_completions(pair.generate("x", weights={name: 1}), pair.generate("x", weights=domain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"nobody": 1}}, "nobody"),
        ({"weights": "third"}, "Domains: first, second"),
        ({"weights": {"shared": -1}}, "negative"),
        ({"combine": "cubic"}, "cubic"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_senseless_options_are_refused(pair, options, message):
    with pytest.raises(InputError, match=message):
        pair.generate("x", **options)
    with pytest.raises(InputError, match=message):
        pair.stream("x", **options)  # at once, not at the first chunk


def test_an_unknown_option_is_a_type_error(pair):
    with pytest.raises(TypeError, match="topk"):
        pair.generate("x", topk=3)


def test_every_option_is_documented():
    for name in GenerateOptions.__annotations__:
        assert f"        {name}: " in (GenerateOptions.__doc__ or "")


# Streaming


def test_a_stream_is_the_completion_in_pieces(pair):
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 5, "stop": "~"}
    chunks = list(pair.stream("xy", **options))
    done = chunks[-1].completion
    assert all(chunk.completion is None and chunk.text for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == done.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == done.token_ids
    same_completions(done, pair.generate("xy", **options))


def test_streams_give_whole_characters(mixture_of):
    texts = [chunk.text for chunk in mixture_of({"a": saying("Zwölf👩")}).stream("Z")]
    assert texts == ["w", "ö", "l", "f", "👩", ""]


def test_closing_a_stream_frees_its_caches(pair, monkeypatch):
    freed = []

    def free(cache):
        freed.append(cache)

    monkeypatch.setattr(SharedCache, "free", free)
    stream = pair.stream("x")
    next(stream)
    assert not freed
    stream.close()
    assert freed


def test_an_interrupted_call_leaves_the_mixture_as_it_was(pair, monkeypatch):
    before = pair.generate("x", max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(CompletionBuilder, "add", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pair.generate("x", max_new_tokens=5)
    same_completions(pair.generate("x", max_new_tokens=5), before)


def test_chat_goes_through_the_template(mixture_of):
    mixture = mixture_of({"a": saying("One two!")}, chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "O"}]
    assert mixture.chat(messages, stop="!").text == "ne two"
    assert "".join(chunk.text for chunk in mixture.stream_chat(messages)) == "ne two!"


def test_threads_share_a_mixture(pair):
    prompts = ["one", "two words", "and three words", "x"]
    options = {"max_new_tokens": 25, "temperature": 1.0, "seed": 9}
    serial = [pair.generate(prompt, **options) for prompt in prompts]
    parallel = [None] * len(prompts)

    def work(index):
        parallel[index] = pair.generate(prompts[index], **options)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(serial, parallel, strict=True):
        same_completions(one, other)


def test_missing_and_numpy_values_are_options(tmp_path):
    folder = write_bundle(tmp_path / "b", {"a": random_member(0, tokens=VOCABULARY)})
    with Mixture.load(folder) as mixture:
        plain = mixture.generate("1", max_new_tokens=3, temperature=1.0, seed=5)
        same = mixture.generate("1", max_new_tokens=np.int64(3), temperature=1.0, seed=np.int64(5), stop=None)
        assert same.token_ids == plain.token_ids
        for wrong in ({"max_new_tokens": 2.5}, {"top_k": 1.5}, {"seed": "x"}, {"weights": {"a": "0.5"}}):
            with pytest.raises(InputError):
                mixture.generate("1", **wrong)
