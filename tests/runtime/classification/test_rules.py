"""Rules as members: reading their files, and what fires where."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.recipe.rules_file import RuleSet
from edgemix.runtime.classification.rules import RuleMatcher

ROOT = Path(__file__).parents[3]
SENTIMENT = b"""
labels: [neg, pos]
axis: [neg, pos]
scores: {good: 2, bad: -2, ":)": 1.5, "\xe2\x9d\xa4": 3}
phrases:
  - {text: New York, label: pos, strength: 1}
negations: [not, isn't]
boosters: {very: 0.293}
capitals: 0.733
"""


@pytest.fixture(scope="module")
def matcher():
    return RuleMatcher(RuleSet.parse(SENTIMENT))


@pytest.mark.parametrize(
    ("text", "fired"),
    [
        ("a good day", [("good", "pos", 2)]),
        ("not good", [("good", "neg", 2 * 0.74)]),
        ("It isn\u2019t a bad one", [("bad", "pos", 2 * 0.74)]),
        ("not one of the words is good", [("good", "pos", 2)]),
        ("very very bad", [("bad", "neg", 2 + 0.293 * 1.95)]),
        ("a GOOD day", [("GOOD", "pos", 2.733)]),
        ("fine :) \u2764!", [(":)", "pos", 1.5), ("\u2764", "pos", 3)]),
        ("new york", [("new york", "pos", 1)]),
    ],
)
def test_rules_fire_with_negations_and_boosters(matcher, text, fired):
    score = matcher.score(text)
    assert [(rule.rule, rule.label, pytest.approx(rule.strength)) for rule in score.fired] == fired
    assert [text[rule.start : rule.end] for rule in score.fired] == [rule for rule, *_ in fired]
    total = sum(strength if label == "pos" else -strength for _, label, strength in fired)
    assert (score.logits[1] > score.logits[0]) == (total > 0)


@pytest.mark.parametrize("text", ["", "nothing here", " \n", ": )", "goodness"])
def test_a_text_without_a_rule_abstains(matcher, text):
    score = matcher.score(text)
    assert score.abstains
    assert not score.fired
    assert not score.logits.any()


def test_names_from_a_file_label_words(tmp_path):
    (tmp_path / "places.txt").write_text("New York\nParis\n")
    (tmp_path / "rules.yaml").write_text("labels: [LOC]\ngazetteers: [{label: LOC, file: places.txt}]\n")
    rules = RuleSet.load(tmp_path / "rules.yaml")
    text = "In New York not paris"
    matcher = RuleMatcher(RuleSet.parse(rules.save()))
    scores = matcher.score_words(text, [match.span() for match in re.finditer(r"\w+", text)])
    assert matcher.word_labels == ("B-LOC", "I-LOC")
    np.testing.assert_array_equal(scores.logits > 0, [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(scores.abstains, [True, False, False, True, True])


def test_names_from_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "rules.yaml").write_text("labels: [LOC]\ngazetteers: [{label: LOC, file: ../names.txt}]\n")
    with pytest.raises(InputError, match="outside the folder"):
        RuleSet.load(tmp_path / "rules.yaml")


def test_all_mistakes_are_told_with_their_lines():
    with pytest.raises(InputError) as error:
        RuleSet.parse(
            b"labels: [a, b, a]\nlexicon:\n  x: {c: 1}\n  y: {a: .nan}\nreech: 2\n"
            b"phrases: [{text: z, label: b, strength: no}]"
        )
    for part in (
        "line 1: labels",
        "line 3: lexicon.x.c: unknown label",
        "line 4: lexicon.y.a",
        "line 5: reech",
        "line 6",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"labels: &a [x]\nphrases: *a",
        b'{"labels": ["a"], "lexicon": {"x": {"a": 1e999}}}',
        b"labels: [a, b]\nscores: {x: 1}",
        b"labels: [a]\nlexicon: {x: {a: 1, a: 2}}",
        b"labels: [a]\nlexicon: {x: 1, y: [a]}",
        b'{"labels": ["a"]}' + b" " * (64 << 20),
    ],
)
def test_hostile_files_are_refused(data):
    with pytest.raises(InputError):
        RuleSet.parse(data)


def test_patterns_are_matched_in_linear_time():
    pytest.importorskip("re2")
    matcher = RuleMatcher(RuleSet.parse(b"labels: [a]\npatterns: [{pattern: '(x+x+)+y', label: a, strength: 2}]"))
    assert matcher.score("x" * 100_000).abstains
    (fired,) = matcher.score("é xxy").fired
    assert (fired.start, fired.end, fired.strength) == (2, 5, 2)


@pytest.mark.parametrize("pattern", ["(", r"(a)\1", "((a{1000}){1000})"])
def test_patterns_that_are_not_regular_are_refused(pattern):
    pytest.importorskip("re2")
    rules = RuleSet.parse(f"labels: [a]\npatterns: [{{pattern: '{pattern}', label: a}}]".encode())
    with pytest.raises(InputError, match="pattern"):
        RuleMatcher(rules)


def test_the_lexicon_of_vader_becomes_rules():
    rules = runpy.run_path(str(ROOT / "tools/vader_rules.py"))["rules_of"](
        "good\t1.9\t0.9\t[2]\nGrin\t2.1\t0.8\t[2]\n", "\U0001f600\tgrin face\n"
    )
    matcher = RuleMatcher(RuleSet.parse(rules.save()))
    fired = matcher.score("isn't good \U0001f600").fired
    assert [(rule.label, pytest.approx(rule.strength)) for rule in fired] == [
        ("negative", 1.9 * 0.74),
        ("negative", 2.1 * 0.74),
    ]


def test_rules_that_cancel_have_no_opinion() -> None:
    rules = RuleSet.parse(b"labels: [neg, pos]\naxis: [neg, pos]\nscores: {good: 2.0, bad: -2.0, bus: 0.0}")
    matcher = RuleMatcher(rules)
    assert [each.abstains for each in matcher.score_batch(["good", "bus stop", "x"])] == [False, True, True]


@pytest.mark.parametrize("file", ["../names.txt", "a\u0000b", "/etc/passwd", "missing.txt"])
def test_names_come_from_files_beside_the_rules_only(tmp_path: Path, file: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"labels": ["A"], "gazetteers": [{"label": "A", "file": file}]}))
    for load in (RuleSet.load, RuleSet.load_stored):
        with pytest.raises(InputError):
            load(path)
