"""Commands on bundles over labels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from helpers.label_members import LabelBundle, random_classifier

from edgemix.cli import edgemix

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = {"one": random_classifier(1, ("neg", "pos")), "two": random_classifier(2, ("pos", "neg"))}
    domains = {"films": {"one": 1.0, "two": 0.0}}
    return LabelBundle(members, domains=domains).write(tmp_path_factory.mktemp("b") / "bundle")


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(edgemix, [str(each) for each in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_predict_takes_texts_files_and_stdin(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "third"}\n{"text": "fourth"}\n')
    (tmp_path / "t.txt").write_text("fifth\n\nsixth\n")
    found = json.loads(
        run(
            "predict", bundle, "first", "second", "--file", tmp_path / "t.jsonl", "--file", tmp_path / "t.txt", "--json"
        )
    )
    texts = [each["text"] for each in found["predictions"]]
    assert texts == ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert all(sum(each["probabilities"].values()) == pytest.approx(1) for each in found["predictions"])
    shown = run("predict", bundle, "--members", stdin="a line\nanother\n")
    assert "a line" in shown
    assert "one" in shown
    films = json.loads(run("predict", bundle, "x", "--weights", "films", "--json"))["predictions"][0]
    own = json.loads(run("predict", bundle, "x", "--weights", "one=1", "--json"))["predictions"][0]
    assert films["probabilities"] == own["probabilities"]
    assert json.loads(run("predict", bundle, "x", "--decision", "--json"))["predictions"][0]["labels"]


def test_evaluate_shows_each_member_and_mixture(bundle: Path, tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "label": ["neg", "pos"][i % 2]} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = json.loads(run("evaluate", bundle, tmp_path / "test.jsonl", "--json"))
    assert [row["name"] for row in found["rows"]] == ["one", "two", "uniform", "fitted", "fitted to films"]
    assert found["rows"][0]["overall"]["examples"] == 20
    shown = run("evaluate", bundle, tmp_path / "test.jsonl", "--no-speed")
    assert "Expected calibration error" in shown
    assert "Confusion" in shown


def test_inspect_and_verify(bundle: Path) -> None:
    shown = run("inspect", bundle)
    assert "text-classification" in shown
    assert "Labels: neg, pos." in shown
    assert "is intact" in run("verify", bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{bundle}"], "there is no text"),
        (["predict", "{bundle}", "x", "--weights", "a=b"], "is no MEMBER=SHARE"),
        (["predict", "{bundle}", "x", "--weights", "nothing"], "no weights 'nothing'"),
        (["predict", "{bundle}", "x", "y", "--pair", "z"], "--pair goes with one TEXT"),
        (["generate", "{bundle}", "x"], "is a bundle of text-classification"),
        (["chat", "{bundle}"], "is a bundle of text-classification"),
        (["profile", "{bundle}"], "is a bundle of text-classification"),
        (["report", "{bundle}", "-o", "x.html"], "is a bundle of text-classification"),
        (["evaluate", "{bundle}", "{folder}/bad.jsonl"], "none of its labels is the bundle's"),
        (["evaluate", "{bundle}", "{folder}/none.jsonl"], "has no field 'label'"),
        (
            ["export", "{folder}/recipe.yaml", "-o", "{folder}/x", "--budget", "1MB"],
            "choose formats of text-generation",
        ),
    ],
)
def test_mistakes_of_the_user(bundle: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "other"}\n')
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rules.yaml").write_text("labels: [neg, pos]\nlexicon: {good: {pos: 1.0}}\n")
    (tmp_path / "recipe.yaml").write_text("task: text-classification\nmembers: [{name: a, rules: rules.yaml}]\n")
    given = [each.format(bundle=bundle, folder=tmp_path) for each in arguments]
    assert message in run(*given, code=2, stdin="")


def test_feedback_and_explanations(tmp_path: Path) -> None:
    members = {"one": random_classifier(1, ("neg", "pos")), "two": random_classifier(2, ("pos", "neg"))}
    bundle = LabelBundle(members).write(tmp_path / "bundle")
    lines = [{"text": f"text {i}", "label": "pos"} for i in range(30)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = run("inspect", bundle)
    assert "Nothing was changed." in run("feedback", bundle, tmp_path / "c.jsonl", "--dry-run")
    assert run("inspect", bundle) == before
    found = json.loads(run("feedback", bundle, tmp_path / "c.jsonl", "--training", tmp_path / "t.jsonl", "--json"))
    assert found["after"] != found["before"]
    assert "is intact" in run("verify", bundle)
    wrong = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert all(each["label"] == "pos" for each in wrong)
    explained = json.loads(run("predict", bundle, "one two three", "--explain", "--json"))["explanations"][0]
    assert [word["text"] for word in explained["words"]] == ["one", "two", "three"]
    assert "Without it" in run("predict", bundle, "one two", "--explain")
    assert "no examples" in run("feedback", bundle, empty(tmp_path), code=2)


def empty(folder: Path) -> Path:
    (folder / "empty.jsonl").write_text("\n")
    return folder / "empty.jsonl"


def test_predict_knows_every_task_over_labels(bundle: Path, tmp_path: Path) -> None:
    tags = {"one": random_classifier(1, ("O", "B-PER", "I-PER"), by_token=True)}
    tagger = LabelBundle(tags, task="token-classification").write(tmp_path / "tagger")
    found = json.loads(run("predict", tagger, "Ada met Bo", "--json"))["predictions"][0]
    assert len(found["labels"]) == len(found["words"]) == 3
    assert "Ada met Bo" in run("predict", tagger, "Ada met Bo")
    assert "only for text-classification" in run("predict", tagger, "x", "--explain", code=2)
    rows = [{"tokens": ["Ada", "met"], "labels": ["B-PER", "O"]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = run("evaluate", tagger, tmp_path / "t.jsonl", "--no-speed")
    assert "Entity F1" in shown
