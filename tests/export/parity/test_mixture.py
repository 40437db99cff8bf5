"""What quantization costs a mixture, against closed forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.onnx_members import VOCABULARY, ClosedForm, random_member, write_bundle, write_graph
from safetensors.numpy import load_file

from edgemix.export.parity import mixture
from edgemix.export.parity.against_fp32 import check_quantized
from edgemix.export.parity.limits import TOP1_MARGIN
from edgemix.export.parity.mixture import ObservedTexts, compare_mixtures, keep_distributions
from edgemix.runtime import Mixture
from edgemix.runtime.token_progress import token_callback

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.manifest import MixtureParity

WEIGHTS = {"one": 0.7, "two": 0.3}
TEXTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 50)).tolist()


def exact(seed: int) -> ClosedForm:
    return random_member(seed, tokens=VOCABULARY, padding=6 * seed)


def rough(seed: int, **options: int) -> ClosedForm:
    """The same member with noise on its numbers, as quantization leaves it."""
    table = exact(seed).table.copy()
    table[:, :VOCABULARY] += np.random.default_rng(9 + seed).normal(size=(VOCABULARY, VOCABULARY)) * 0.5
    return ClosedForm(table, pull=3.0, tilt=0.25, **options)


STORED = {"one": rough(1), "two": rough(2)}


def measure(folder: Path, stored: dict[str, ClosedForm], weights: dict[str, float] = WEIGHTS) -> MixtureParity:
    """The figures of a bundle whose fp32 members were `exact`; a member that is exact itself is taken as it is."""
    kept = {}
    for seed, (name, form) in enumerate(stored.items(), start=1):
        if not np.array_equal(form.table, exact(seed).table):
            config = write_graph(folder / f"fp32/{name}/model.onnx", exact(seed))
            kept[name] = folder / f"{name}.safetensors"
            keep_distributions(folder / f"fp32/{name}/model.onnx", config, TEXTS, kept[name])
    with Mixture.load(write_bundle(folder / "bundle", stored, weights=weights), threads=1) as mixture:
        return compare_mixtures(mixture, kept, TEXTS)


def mixed(forms: list[ClosedForm], weights: dict[str, float], length: int = 50) -> np.ndarray:
    """Log-probabilities [texts, tokens - 1, vocabulary]."""
    parts = [np.stack([form.log_probabilities(text[:length])[:-1] for text in TEXTS]) for form in forms]
    return np.log(sum(weight * np.exp(part) for weight, part in zip(weights.values(), parts, strict=True)))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_figures_follow_their_formulas(tmp_path: Path) -> None:
    p, q = mixed([exact(1), exact(2)], WEIGHTS), mixed(list(STORED.values()), WEIGHTS)
    targets = np.array(TEXTS)[:, 1:, None]
    figures = measure(tmp_path, STORED)
    assert (figures.weights, figures.tokens) == (WEIGHTS, 3 * 49)
    assert figures.kl == pytest.approx(divergence(p, q), rel=1e-3)
    preferred = p.max(-1) - np.take_along_axis(p, q.argmax(-1)[..., None], -1)[..., 0]
    assert figures.top1_disagreement == pytest.approx((preferred > TOP1_MARGIN).mean(), abs=0.01)
    surprise = (np.take_along_axis(p, targets, -1) - np.take_along_axis(q, targets, -1)).mean()
    assert figures.perplexity_ratio == pytest.approx(np.exp(surprise), rel=1e-3)


def test_averaging_hides_part_of_the_members_losses(tmp_path: Path) -> None:
    """KL divergence is jointly convex; the figure needs no limit of its own."""
    own = [divergence(mixed([exact(seed)], {"": 1}), mixed([rough(seed)], {"": 1})) for seed in (1, 2)]
    assert 0 < measure(tmp_path, STORED).kl < 0.95 * (0.7 * own[0] + 0.3 * own[1])


def test_equal_graphs_have_no_distance(tmp_path: Path) -> None:
    config = write_graph(tmp_path / "model.onnx", exact(1))
    keep_distributions(tmp_path / "model.onnx", config, TEXTS, tmp_path / "kept.safetensors")
    folder = write_bundle(tmp_path / "bundle", {"one": exact(1), "two": exact(2)}, weights=WEIGHTS)
    with Mixture.load(folder, threads=1) as mixture:
        unkept = compare_mixtures(mixture, {}, TEXTS)
        kept = compare_mixtures(mixture, {"one": tmp_path / "kept.safetensors"}, TEXTS)
    assert (unkept.kl, unkept.top1_disagreement, unkept.perplexity_ratio) == (0, 0, 1)
    assert kept.kl == pytest.approx(0, abs=5e-6)  # half precision
    assert kept.perplexity_ratio == pytest.approx(1, abs=2e-4)


def test_a_member_stored_in_fp32_loses_nothing_itself(tmp_path: Path) -> None:
    stored = {"one": exact(1), "two": rough(2)}
    expected = divergence(mixed([exact(1), exact(2)], WEIGHTS), mixed(list(stored.values()), WEIGHTS))
    assert measure(tmp_path, stored).kl == pytest.approx(expected, rel=1e-3)


def test_a_member_without_weight_does_not_count(tmp_path: Path) -> None:
    figures = measure(tmp_path, STORED, {"one": 1.0, "two": 0.0})
    assert figures.kl == pytest.approx(divergence(mixed([exact(1)], {"": 1}), mixed([rough(1)], {"": 1})), rel=1e-3)


def test_texts_are_cut_to_the_smallest_context(tmp_path: Path) -> None:
    stored = {"one": rough(1), "two": rough(2, context=20)}
    expected = divergence(
        mixed([exact(1), exact(2)], WEIGHTS, length=20), mixed(list(stored.values()), WEIGHTS, length=20)
    )
    figures = measure(tmp_path, stored)
    assert figures.tokens == 3 * 19
    assert figures.kl == pytest.approx(expected, rel=1e-3)


def test_figures_do_not_depend_on_the_rows_mixed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(tmp_path / "whole", STORED)
    monkeypatch.setattr(mixture, "MIXED_ROWS", 7)
    parts = measure(tmp_path / "parts", STORED)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)


def test_kept_distributions_are_those_of_the_graph(tmp_path: Path) -> None:
    form = random_member(3, tokens=VOCABULARY, padding=6, context=30)
    config = write_graph(tmp_path / "model.onnx", form)
    keep_distributions(tmp_path / "model.onnx", config, TEXTS, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert {name: (rows.shape, rows.dtype) for name, rows in kept.items()} == {
        str(number): ((29, VOCABULARY + 6), np.float16) for number in range(3)
    }
    own = kept["1"][:, :VOCABULARY].astype(np.float64)
    own -= np.log(np.exp(own).sum(-1, keepdims=True))
    np.testing.assert_allclose(own, form.log_probabilities(TEXTS[1][:30])[:-1], atol=0.01)


def test_distributions_that_the_gate_has_computed_are_kept(tmp_path: Path) -> None:
    """The gate's distributions of the beginnings of its texts are used again; another text is computed anew."""
    form = random_member(3, tokens=VOCABULARY, context=200)
    path = tmp_path / "model.onnx"
    config = write_graph(path, form)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (12, 60)).tolist()
    texts, read = [windows[0][:50], windows[1][:50], windows[2][1:30]], list[float]()
    observed = ObservedTexts(texts)
    check_quantized(path, path, config, windows, format="fp32", observe=observed.add)
    with token_callback(read.append):
        keep_distributions(path, config, texts, tmp_path / "some.safetensors", observed=observed.rows)
    keep_distributions(path, config, texts, tmp_path / "all.safetensors")
    some, every = load_file(tmp_path / "some.safetensors"), load_file(tmp_path / "all.safetensors")
    assert sum(read) == len(texts[2]) - 1
    assert some.keys() == every.keys()
    for name, rows in every.items():
        np.testing.assert_allclose(some[name].astype(np.float32), rows.astype(np.float32), atol=2e-3)
