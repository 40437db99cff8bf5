"""`edgemix lm-eval`: the harness's command line with a bundle as its model."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partialmethod

import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None,
    reason="lm_eval's own dependencies, which read tasks, are not installed (half a gigabyte)",
)


def run(*arguments: object):
    return CliRunner().invoke(edgemix, ["lm-eval", *map(str, arguments)])


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
def test_json_is_refused_for_arguments_without_results(arguments, message):
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
def test_invalid_arguments(tasks, arguments, code, message):
    result = run("run", "--model", "edgemix", "--include_path", tasks, *arguments)

    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
