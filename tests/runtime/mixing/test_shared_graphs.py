"""Several members in one graph: everything is as with a graph for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.writer import write_manifest
from edgemix.errors import BundleError, EdgemixError
from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.evaluate import evaluate

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
TEXTS = ["The owl sat on the mat.", "A fox, a hen and a dog", "x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    forms = {name: random_member(seed, tokens=VOCABULARY, padding=6) for seed, name in enumerate(WEIGHTS)}
    folder = tmp_path_factory.mktemp("members")
    return {
        kind: write_bundle(folder / kind, forms, weights=WEIGHTS, stacked=kind == "stacked")
        for kind in ("apart", "stacked")
    }


@pytest.fixture(scope="module")
def apart(folders: dict[str, Path]) -> Mixture:
    return Mixture.load(folders["apart"], provider="cpu", threads=1)


@pytest.fixture(scope="module")
def stacked(folders: dict[str, Path]) -> Mixture:
    return Mixture.load(folders["stacked"], provider="cpu", threads=1)


def test_the_graph_is_opened_once(stacked: Mixture) -> None:
    ensemble = stacked.ensemble()
    assert len(ensemble.graphs) == 1
    assert ensemble.weights.tolist() == pytest.approx(list(WEIGHTS.values()))
    assert stacked.members == tuple(WEIGHTS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9},
        {"weights": {"b": 1.0}},
        {"weights": {"c": 0.4, "a": 0.6}, "repetition_penalty": 1.5},
        {"combine": "log-linear", "temperature": 0.7, "seed": 1},
    ],
)
def test_generation_is_the_same(apart: Mixture, stacked: Mixture, options: dict[str, object]) -> None:
    ours, theirs = (mixture.generate(TEXTS, max_new_tokens=20, **options) for mixture in (stacked, apart))
    assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


def test_scores_are_the_same(apart: Mixture, stacked: Mixture) -> None:
    for options in ({}, {"window": 7}, {"combine": "log-linear"}, {"weights": {"a": 1.0}}):
        ours, theirs = (mixture.score(TEXTS[0], **options) for mixture in (stacked, apart))
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
        np.testing.assert_allclose(ours.member_log_probabilities, theirs.member_log_probabilities, atol=1e-4)


def test_evaluations_are_the_same(apart: Mixture, stacked: Mixture) -> None:
    ours, theirs = (evaluate(mixture, {"text": TEXTS[:2]}) for mixture in (stacked, apart))
    assert [row.name for row in ours.rows] == [row.name for row in theirs.rows]
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert one.overall.perplexity == pytest.approx(other.overall.perplexity, rel=1e-4)
        assert one.overall.agreement == other.overall.agreement


def test_a_manifest_with_another_member_count_than_the_graph_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    manifest = read_manifest(folders["stacked"])
    weights = msgspec.structs.replace(manifest.weights, default=dict.fromkeys(("a", "b"), 0.5))
    fewer = msgspec.structs.replace(manifest, members=manifest.members[:2], weights=weights)
    with pytest.raises(EdgemixError, match="has 2 consecutive members, and should have 3"):
        write_manifest(tmp_path, fewer)
    config = msgspec.structs.replace(manifest.members[0].config, member_count=2)
    pair = tuple(msgspec.structs.replace(entry, config=config) for entry in fewer.members)
    write_manifest(tmp_path, wrong := msgspec.structs.replace(fewer, members=pair))
    with pytest.raises(BundleError, match="the manifest says 2 members"):
        Mixture.assemble(folders["stacked"], wrong, "cpu")
