"""lm-evaluation-harness gets from a bundle what it gets from the model itself through transformers."""

import json

import pytest
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.export.pipeline import export_bundle
from edgemix.recipe.schema import MemberRecipe, Recipe

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

QUESTIONS = [
    {"question": "the quick brown", "answers": [" fox", " dog", " fax"], "right": 0},
    {"question": "the lazy", "answers": [" cat", " dog", " do", """ "dog\""""], "right": 1},
    {"question": "a and b", "answers": [" ab", " a"], "right": 1},
]


@pytest.fixture(scope="module", params=[True, False], ids=["begins with bos", "has bos"])
def models(request, tmp_path_factory):
    """The harness's models of a tiny llama, through transformers and as a bundle; its tokenizer puts the
    beginning-of-text token before every text, or only has one.
    """
    from lm_eval.models.huggingface import HFLM

    from edgemix.cli.lm_eval.model import MixtureLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(bos=request.param)
    # No larger vocabulary: a random model gives padding probability, which the runtime cuts off.
    model = tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder / "one")
    tokenizer.save_pretrained(folder / "one")
    export_bundle(Recipe(members=(MemberRecipe("one", "one"),), format="fp32", folder=folder), folder / "bundle")
    return HFLM(pretrained=model, tokenizer=tokenizer), MixtureLM(bundle=folder / "bundle", provider="cpu", threads=1)


def answers(models, kind, *arguments):
    from lm_eval.api.instance import Instance

    asked = [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]
    return [getattr(model, kind)(asked, disable_tqdm=True) for model in models]


def test_both_models_get_the_same_tokens(models):
    theirs, ours = models
    for text in ("", "the quick brown fox", "<s>abab"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_loglikelihoods(models):
    pairs = [(each["question"], answer) for each in QUESTIONS for answer in each["answers"]]
    pairs += [("", "the fox"), ("the fox " * 60, "sleeps"), ("the ", "dog"), ("<s>the", " dog")]
    for (total, greedy), (expected, most_probable) in zip(*answers(models, "loglikelihood", *pairs), strict=True):
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == most_probable


def test_rolling_loglikelihoods(models):
    texts = [("the quick brown fox",), ("jumps over the lazy dog. " * 30,), ("ab",)]
    theirs, ours = answers(models, "loglikelihood_rolling", *texts)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_greedy_texts(models):
    prompts = [(prompt, {"until": ["\n\n"], "max_gen_toks": 24}) for prompt in ("the quick", "a", "fox " * 80)]
    theirs, ours = answers(models, "generate_until", *prompts)
    assert ours == theirs
    assert all(ours)


def test_a_context_of_spaces_counts_as_an_empty_one(models):
    """The spaces belong to the continuation, which the harness's own model does not answer without a context."""
    _, ours = models
    asked = [("  ", "dog"), ("", "  dog")]
    (white, _), (empty, _) = answers((ours,), "loglikelihood", *asked)[0]
    assert white == pytest.approx(empty, abs=1e-6)


def test_local_tasks(models, tmp_path, monkeypatch):
    reason = "lm_eval's own dependencies, which read tasks, are not installed (half a gigabyte)"
    datasets = pytest.importorskip("datasets", reason=reason)
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"doc_to_choice": "{{answers}}", "doc_to_target": "right", "target_delimiter": "", "num_fewshot": 0}
    kinds = {
        "choose": {"output_type": "multiple_choice", **choice},
        "read": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"},
        "write": {
            "output_type": "generate_until",
            "doc_to_target": "{{answers[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        },
    }
    metrics = {"choose": ["acc", "acc_norm"], "read": ["word_perplexity", "bits_per_byte"], "write": ["exact_match"]}
    for task, own in kinds.items():
        config = {"task": task, **common, **own, "metric_list": [{"metric": metric} for metric in metrics[task]]}
        (tmp_path / f"{task}.yaml").write_text(json.dumps(config))
    theirs, ours = (
        lm_eval.simple_evaluate(
            model,
            tasks=list(kinds),
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        for model in models
    )
    for task in kinds:
        for metric in metrics[task]:
            found, expected = (each["results"][task][f"{metric},none"] for each in (ours, theirs))
            assert found == pytest.approx(expected, rel=1e-4)
        for found, expected in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "write":
                assert found["resps"][0][0] == expected["resps"][0][0]
