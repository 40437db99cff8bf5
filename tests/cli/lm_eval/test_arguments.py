"""`--model_args` and a task's `generation_kwargs` as the runtime's options."""

from __future__ import annotations

import pytest

from edgemix.cli.lm_eval.arguments import ModelArguments, generation_options
from edgemix.errors import InputError


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
def test_bad_model_args(arguments, message):
    with pytest.raises(InputError, match=message):
        ModelArguments.parse(arguments)


def test_model_args_as_texts(tmp_path):
    arguments = ModelArguments.parse(
        {"bundle": tmp_path, "weights": " math:0.5; code : 1e-1;", "threads": "2", "batch_size": "8", "student": False}
    )
    assert (arguments.bundle, arguments.threads, arguments.texts_per_batch) == (tmp_path, 2, 8)
    assert arguments.weight_choice == {"math": 0.5, "code": 0.1}
    assert ModelArguments.parse({"bundle": "b", "weights": "adaptive", "batch_size": "auto:4"}).texts_per_batch == 1
    assert ModelArguments.parse({"bundle": "b", "weights": "math"}).weight_choice == "math"


@pytest.mark.parametrize("weights", ["math:half", ":1", "math:1;math:2", "math:1;code"])
def test_weights_must_be_name_number_pairs(weights):
    with pytest.raises(InputError, match="NAME:NUMBER"):
        _ = ModelArguments.parse({"bundle": "b", "weights": weights}).weight_choice


@pytest.mark.parametrize(("size"), ["0", "-1", "many"])
def test_invalid_batch_sizes(size):
    with pytest.raises(InputError, match="--batch_size"):
        _ = ModelArguments.parse({"bundle": "b", "batch_size": size}).texts_per_batch


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
def test_generation_kwargs(given, expected):
    assert generation_options(given) == (expected, 0)


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"beams": 1}])
def test_unsupported_generation_kwargs(given):
    with pytest.raises(InputError, match=next(iter(given))):
        generation_options(given)
