"""`edgemix lm-eval`, and what a bundle answers to lm-evaluation-harness, against closed forms."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from functools import partialmethod

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.onnx_members import BOS, EOS, VOCABULARY, mixed, random_member, saying, write_bundle

from edgemix.cli import edgemix
from edgemix.errors import InputError
from edgemix.runtime import Mixture

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None,
    reason="lm_eval's own dependencies, which read tasks, are not installed (half a gigabyte)",
)


def run(*arguments: object):
    return CliRunner().invoke(edgemix, ["lm-eval", *map(str, arguments)])


@pytest.fixture
def harness():
    """The module that registers the model."""
    from edgemix.cli.lm_eval import model as module

    return module


@pytest.fixture
def model(harness):
    """Makes a model of a bundle and other model_args."""
    return lambda bundle, **arguments: harness.MixtureLM(bundle=str(bundle), provider="cpu", threads=1, **arguments)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


# The command line


def test_without_the_harness_the_extra_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    result = run("run", "--model", "edgemix", "--model_args", f"bundle={bundle}", "--tasks", "sums")

    assert result.exit_code == 1
    assert result.stderr == (
        "error: edgemix lm-eval needs the package lm_eval, which is not installed\npip install 'edgemix[cpu,lm-eval]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["ls", "tasks"], "'ls' has none"), (["run", "--tasks", "x", "--output_path=y"], "give only one")],
)
def test_json_is_refused_where_it_makes_no_sense(arguments, message):
    result = run("--json", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of two questions, which "math" answers and "code" does not."""
    import datasets
    from lm_eval.tasks import TaskManager

    # Without the harness's own 14,000 files of tasks, which it reads at every run.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {"question": "1+", "answers": ["2=", "x"], "right": 0},
        {"question": "1+2", "answers": ["x", "=3"], "right": 1},
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{answers}}"\n'
        "doc_to_target: right\n"
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


@needs_datasets
def test_a_run_shows_the_harnesses_table(bundle, tasks):
    arguments = ["run", "--model", "edgemix", "--tasks", "sums", "--include_path", tasks]

    good = run(*arguments, "--model_args", f"bundle={bundle},provider=cpu,weights=math:3;code:1")
    bad = run("--json", *arguments, "--model_args", f"bundle={bundle},provider=cpu,weights=programs")

    assert (good.exit_code, bad.exit_code) == (0, 0), good.stderr + bad.stderr
    assert "|sums |" in good.stdout
    assert "|acc   |" in good.stdout
    assert "1|" in good.stdout
    assert json.loads(bad.stdout)["results"]["sums"]["acc,none"] < 1
    assert json.loads(bad.stdout)["config"]["members"] == {"math": "fp32", "code": "fp32"}


@needs_datasets
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "sums", "--model_args", "bundle=nowhere"], 2, "nowhere"),
        (["--tasks", "sums", "--model_args", "bundel=x"], 2, "unknown field `bundel`"),
        (["--tasks", "summs", "--model_args", "bundle=x"], 1, "lm-evaluation-harness: Tasks not found: summs"),
        (["--tusks"], 2, ""),
    ],
)
def test_bad_arguments(tasks, arguments, code, message):
    result = run("run", "--model", "edgemix", "--include_path", tasks, *arguments)

    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# model_args and generation_kwargs


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "bundle"),
        ({"bundle": "b", "weight": "math"}, "unknown field `weight`"),
        ({"bundle": "b", "threads": "many"}, "threads"),
        ({"bundle": "b", "student": "maybe"}, "student"),
        ({"bundle": "b", "student": "true", "weights": "math"}, "Give only one"),
        ({"bundle": "b", "max_length": 1}, "max_length"),
    ],
)
def test_bad_model_args(harness, arguments, message):
    with pytest.raises(InputError, match=message):
        harness.MixtureLM(**arguments)


@needs_lm_eval
def test_model_args_as_texts(harness, tmp_path):
    arguments = harness.ModelArguments.parse(
        {"bundle": tmp_path, "weights": " math:0.5; code : 1e-1;", "threads": "2", "batch_size": "8", "student": False}
    )
    assert (arguments.bundle, arguments.threads, arguments.texts_per_batch) == (tmp_path, 2, 8)
    assert arguments.weight_choice == {"math": 0.5, "code": 0.1}
    assert (
        harness.ModelArguments.parse({"bundle": "b", "weights": "adaptive", "batch_size": "auto:4"}).texts_per_batch
        == 1
    )
    assert harness.ModelArguments.parse({"bundle": "b", "weights": "math"}).weight_choice == "math"


@needs_lm_eval
@pytest.mark.parametrize("weights", ["math:half", ":1", "math:1;math:2", "math:1;code"])
def test_weights_that_are_no_pairs(harness, weights):
    with pytest.raises(InputError, match="NAME:NUMBER"):
        _ = harness.ModelArguments.parse({"bundle": "b", "weights": weights}).weight_choice


@needs_lm_eval
@pytest.mark.parametrize(("size"), ["0", "-1", "many"])
def test_batch_sizes_that_are_none(harness, size):
    with pytest.raises(InputError, match="--batch_size"):
        _ = harness.ModelArguments.parse({"bundle": "b", "batch_size": size}).texts_per_batch


@needs_lm_eval
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"stop": [], "temperature": 0.0}),
        ({"until": "\n", "max_gen_toks": 9}, {"stop": ["\n"], "temperature": 0.0, "max_new_tokens": 9}),
        ({"until": ["a", ""], "max_new_tokens": 9}, {"stop": ["a"], "temperature": 0.0, "max_new_tokens": 9}),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, {"stop": [], "temperature": 0.0}),
        ({"temperature": 0.7}, {"stop": [], "temperature": 0.7}),
        ({"do_sample": True, "top_p": 0.9}, {"stop": [], "temperature": 1.0, "top_p": 0.9}),
    ],
)
def test_generation_kwargs(harness, given, expected):
    assert harness.generation_options(given) == (expected, 0)


@needs_lm_eval
@pytest.mark.parametrize("given", [{"num_beams": 4}, {"beams": 1}])
def test_generation_kwargs_that_cannot_be_had(harness, given):
    with pytest.raises(InputError, match=next(iter(given))):
        harness.generation_options(given)


# Requests


@needs_lm_eval
@pytest.mark.parametrize("mix", [{}, {"weights": "adaptive"}, {"combine": "log-linear"}, {"weights": "programs"}])
def test_loglikelihood(model, bundle, mix):
    subject, pairs = model(bundle, **mix), [("1+", "2=3"), ("d", "e"), ("1+2 ", "x"), ("1+", "x"), ("d", "ef x")]
    with Mixture.load(bundle, provider="cpu", threads=1) as mixture:
        for (context, text), (total, greedy) in zip(
            pairs, subject.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True), strict=True
        ):
            # A space at a context's end belongs to what follows.
            count = len(text) + len(context) - len(context.rstrip())
            expected = mixture.score(context + text, **mix).log_probabilities[-count:].sum()
            assert total == pytest.approx(expected, abs=1e-4)
            if mix.get("weights") == "programs":
                assert greedy == (context == "d")


@needs_lm_eval
def test_an_empty_context_is_a_token_that_texts_begin_or_end_with(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY)
    for bos, before in ((None, EOS), (BOS, BOS)):
        subject = model(write_bundle(tmp_path / str(bos), {"a": form}, bos=bos))
        expected = mixed([form], [1.0], [before, *b"def"]).sum()
        ((total, _),) = subject.loglikelihood(requests("loglikelihood", ("", "def")), disable_tqdm=True)
        assert total == pytest.approx(expected, abs=1e-4)


@needs_lm_eval
def test_long_contexts_lose_their_beginning(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY, context=8)
    subject = model(write_bundle(tmp_path / "bundle", {"a": form}))
    asked = requests("loglikelihood", ("abcdefghijkl", "mn"))
    ((total, _),) = subject.loglikelihood(asked, disable_tqdm=True)
    assert total == pytest.approx(mixed([form], [1.0], [*b"fghijklmn"])[-2:].sum(), abs=1e-4)
    with pytest.raises(InputError, match="9 tokens, more than the 8"):
        subject.loglikelihood(requests("loglikelihood", ("a", "bcdefghij")), disable_tqdm=True)


@needs_lm_eval
def test_rolling_windows_score_each_token_once(model, tmp_path):
    form = random_member(3, tokens=VOCABULARY, context=8)
    subject = model(write_bundle(tmp_path / "bundle", {"a": form}))
    text, other = b"abcdefghijkl", b"xyz"
    windows = [([EOS, *text[:8]], 8), ([*text[3:]], 4)]  # the last one has all the context there is room for
    expected = sum(mixed([form], [1.0], ids)[-count:].sum() for ids, count in windows)
    found = subject.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text.decode(),), ("",), (other.decode(),)), disable_tqdm=True
    )
    np.testing.assert_allclose(found, [expected, 0, mixed([form], [1.0], [EOS, *other]).sum()], atol=1e-4)


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_generate_until(model, bundle, batch_size):
    subject = model(bundle, weights="numbers", batch_size=batch_size)
    asked = requests(
        "generate_until",
        ("1", {"until": ["="]}),
        ("1+", {"until": ["zz"], "max_gen_toks": 4}),
        ("2", {"until": ["="], "max_gen_toks": 1}),
        ("1+2", {"until": ["="]}),
        ("+", {"until": ["="]}),
    )
    assert subject.generate_until(asked, disable_tqdm=True) == ["+2", "2=3", "", "", "2"]


@needs_lm_eval
def test_a_prompt_leaves_room_for_what_is_generated(model, tmp_path):
    subject = model(write_bundle(tmp_path / "bundle", {"a": saying("abcdefgh", context=8)}))
    asked = requests("generate_until", ("xxxxxxxxxxxxxxxxab", {"max_gen_toks": 5}))
    assert subject.generate_until(asked, disable_tqdm=True) == ["cdefg"]
    with pytest.raises(InputError, match="8 tokens to generate leave no room"):
        subject.generate_until(requests("generate_until", ("x", {"max_gen_toks": 8})), disable_tqdm=True)


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_can_be_repeated(model, bundle, batch_size):
    subject = model(bundle, batch_size=batch_size)
    asked = requests("generate_until", *[("1+", {"do_sample": True, "temperature": 9.0, "max_gen_toks": 12})] * 3)
    texts, again = (subject.generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert texts == again
    assert len(set(texts)) == 3


@needs_lm_eval
def test_the_student_alone(model, student_bundle):
    """It knows half of what "math" says, so it is greedy about that half only."""
    pairs = requests("loglikelihood", ("1", "+2"), ("2", "="))
    (known, greedy), (unknown, _) = model(student_bundle, student=True).loglikelihood(pairs, disable_tqdm=True)
    assert greedy
    assert known == pytest.approx(0, abs=0.01)
    assert unknown < math.log(0.1)


@needs_lm_eval
def test_texts_begin_with_one_beginning_of_text_token(model, tmp_path):
    subject = model(write_bundle(tmp_path / "bundle", {"a": saying("ab")}, bos=BOS))
    assert subject.tok_encode("a") == [BOS, ord("a")]
    assert subject.tok_encode("<s>a") == [BOS, ord("a")]
    assert subject.tok_encode("a", add_special_tokens=False) == [ord("a")]
    assert (subject.tok_encode(""), subject.tok_encode("", add_special_tokens=False)) == ([BOS], [])


@needs_lm_eval
def test_chats(model, tmp_path):
    template = (
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}[{{ m.role }}]{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    subject = model(write_bundle(tmp_path / "bundle", {"a": saying("ab")}, chat_template=template))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert subject.apply_chat_template(asked) == "[user]Hi\n[assistant]"
    begun = [*asked, {"role": "assistant", "content": "Well, "}]
    assert subject.apply_chat_template(begun, add_generation_prompt=False) == "[user]Hi\n[assistant]Well, "
    assert (subject.chat_template(True), subject.chat_template(False)) == (template, None)

    plain = model(write_bundle(tmp_path / "plain", {"a": saying("ab")}))
    assert plain.tokenizer_name != subject.tokenizer_name
    with pytest.raises(InputError, match="no chat template"):
        plain.chat_template(True)
