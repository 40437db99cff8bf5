"""The gate: what it measures, and what it lets pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import onnx
import pytest
import torch
from helpers.onnx_members import random_member, write_graph
from helpers.tiny_models import tiny_model
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.manifest import GraphParity, QuantizationParity
from edgemix.errors import ParityError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.parity.against_fp32 import check_quantized
from edgemix.export.parity.against_torch import check_graph
from edgemix.export.parity.limits import TOP1_MARGIN, enforce
from edgemix.formats import FORMAT_SPECS, FORMATS
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.token_progress import token_callback

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemix.bundle.graph_io import GraphConfig


class Exported(NamedTuple):
    model: PreTrainedModel
    path: Path
    config: GraphConfig


def noisy(scale: float) -> PreTrainedModel:
    """The tiny llama with noise on its weights, as quantization leaves it."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return model


def export(model: PreTrainedModel, folder: Path) -> Exported:
    exported = export_graph(model, folder, target="cpu")
    return Exported(model, exported.path, exported.config)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_model("llama"), tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(noisy(0.1), tmp_path_factory.mktemp("rough"))


@pytest.fixture
def windows() -> list[list[int]]:
    return np.random.default_rng(5).integers(0, 160, (6, 100)).tolist()


FIGURES = QuantizationParity(
    tokens=1000,
    kl=0.01,
    kl_limit=0.02,
    top1_disagreement=0.0,
    top1_disagreement_limit=0.05,
    perplexity_ratio=1.0,
    perplexity_ratio_limit=1.03,
)


def test_graph_of_a_slightly_different_model_is_over_the_limit(exact: Exported) -> None:
    figures = check_graph(noisy(1e-4), exact.path, exact.config)
    assert min(figures.prefill, figures.decode, figures.padded_batch) > figures.limit


def test_rounding_of_an_unstable_model_is_no_fault(tmp_path: Path) -> None:
    """A fine-tuned SmolLM2 was refused: one position with huge activations differed by 4e-3 nats on every path."""
    unstable = tiny_model("llama")
    with torch.no_grad():
        unstable.lm_head.weight.mul_(1e4)
    row = np.arange(3, 90)
    exported = export(unstable, tmp_path)  # raises if the gate is over its limit
    logits = DecoderGraph.load(exported.path, exported.config).forward([row])[0]
    with torch.no_grad():
        expected = unstable(torch.from_numpy(row)[None]).logits[0]
    difference = torch.log_softmax(expected.double(), -1) - torch.log_softmax(torch.from_numpy(logits).double(), -1)
    assert difference.abs().max() > 3e-4


def test_instability_excuses_no_wrong_graph(exact: Exported) -> None:
    other = noisy(1e-3)
    with torch.no_grad():
        other.lm_head.weight.mul_(1e4)
    figures = check_graph(other, exact.path, exact.config)
    assert min(figures.prefill, figures.decode, figures.padded_batch) > 100 * figures.limit


def test_wrong_numbers_are_never_within_the_limit(exact: Exported) -> None:
    """Python's max drops a NaN that is not first."""
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    figures = check_graph(broken, exact.path, exact.config)
    assert all(np.isnan([figures.prefill, figures.decode, figures.padded_batch]))


def test_graph_against_itself_has_no_distance(exact: Exported, windows: list[list[int]]) -> None:
    figures = check_quantized(exact.path, exact.path, exact.config, windows, format="fp32")
    assert figures.tokens == 6 * 99
    assert (figures.kl, figures.top1_disagreement, figures.perplexity_ratio) == (0.0, 0.0, 1.0)
    assert not enforce(figures)


def test_figures_follow_their_formulas(exact: Exported, rough: Exported, windows: list[list[int]]) -> None:
    with torch.no_grad():
        ids = torch.tensor(windows)
        p, q = (torch.log_softmax(member.model(ids).logits.double(), -1)[:, :-1] for member in (exact, rough))
    next_ids = ids[:, 1:, None]
    preferred = p.amax(-1) - p.gather(-1, q.argmax(-1, keepdim=True))[..., 0]
    figures = check_quantized(exact.path, rough.path, exact.config, windows, format="int4")
    assert figures.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert figures.top1_disagreement == pytest.approx((preferred > TOP1_MARGIN).double().mean().item(), abs=0.005)
    ratio = (p.gather(-1, next_ids) - q.gather(-1, next_ids)).mean().exp().item()
    assert figures.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
    limits = FORMAT_SPECS["int4"].limits
    assert (figures.kl_limit, figures.top1_disagreement_limit) == (limits.kl, limits.top1_disagreement)


def test_decoding_is_measured(exact: Exported, rough: Exported, windows: list[list[int]]) -> None:
    """At 128 positions, evenly from six texts: the last 21 of each that have a successor."""
    with torch.no_grad():
        ids = torch.tensor(windows)
        p, q = (torch.log_softmax(member.model(ids).logits.double(), -1)[:, -22:-1] for member in (exact, rough))
    figures = check_quantized(exact.path, rough.path, exact.config, windows, format="int4")
    assert figures.decode_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    same = check_quantized(exact.path, exact.path, exact.config, windows, format="fp32")
    assert same.decode_kl == pytest.approx(0, abs=1e-6)


def test_each_graph_reads_a_text_once(exact: Exported, windows: list[list[int]]) -> None:
    """And the stored one again the positions at which it decodes, with the text before them kept."""
    read: list[float] = []
    with token_callback(read.append):
        check_quantized(exact.path, exact.path, exact.config, windows, format="fp32")
    assert sum(read) == 2 * 6 * 99 + 6 * 21


def test_a_graph_that_is_wrong_only_when_it_decodes_is_refused(tmp_path: Path) -> None:
    form = random_member(3)
    config = write_graph(tmp_path / "right/model.onnx", form)
    write_graph(tmp_path / "wrong/model.onnx", form)
    model = onnx.load(tmp_path / "wrong/model.onnx")
    for node in model.graph.node:
        node.output[:] = ["right" if name == "logits" else name for name in node.output]
    constants = {"shift": np.linspace(0, 3, 16, dtype=np.float32), "only": np.int64(1), "length_axis": np.int64(1)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["input_ids"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "length_axis"], ["length"]),
            helper.make_node("Equal", ["length", "only"], ["decodes"]),
            helper.make_node("Cast", ["decodes"], ["much"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["much", "shift"], ["error"]),
            helper.make_node("Add", ["right", "error"], ["logits"]),
        ]
    )
    onnx.save(model, tmp_path / "wrong/model.onnx")
    text = np.random.default_rng(0).integers(0, 16, (8, 80)).tolist()
    paths = tmp_path / "right/model.onnx", tmp_path / "wrong/model.onnx"
    figures = check_quantized(*paths, config, text, format="int8")
    assert (figures.kl, figures.top1_disagreement) == (0, 0)
    with pytest.raises(ParityError, match=r"decode kl 0\.\d+ \(limit 0\.02\)"):
        enforce(figures)


def test_texts_too_short_to_decode_in(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    config = write_graph(graph, random_member(3, context=2))
    figures = check_quantized(graph, graph, config, [[1, 2]] * 600, format="int8")
    assert figures.decode_kl is None
    assert not enforce(figures)


def test_near_ties_are_no_disagreement(exact: Exported, tmp_path: Path, windows: list[list[int]]) -> None:
    """A random model's best tokens lie close together; noise far below any limit changes many of them."""
    close = export(noisy(0.002), tmp_path)
    with torch.no_grad():
        ids = torch.tensor(windows)
        best = [member.model(ids).logits.argmax(-1) for member in (exact, close)]
    assert (best[0] != best[1]).any()
    assert check_quantized(exact.path, close.path, exact.config, windows, format="int8").top1_disagreement == 0


def test_without_text_the_graph_samples_some(exact: Exported, rough: Exported) -> None:
    runs = [check_quantized(exact.path, rough.path, exact.config, None, format="int8", seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].kl != runs[2].kl
    assert runs[0].tokens >= 500
    assert runs[0].kl > 0.01


def test_little_text_is_filled_up_with_sampled_text(exact: Exported, rough: Exported) -> None:
    little = [[5, 6, 7], [8], []]
    figures = check_quantized(exact.path, rough.path, exact.config, little, format="int8")
    assert 500 <= figures.tokens < 600


def test_of_much_text_an_even_part_is_used(exact: Exported, rough: Exported) -> None:
    generator = np.random.default_rng(0)
    much = generator.integers(0, 160, (100, 200)).tolist()
    figures = check_quantized(exact.path, rough.path, exact.config, much, format="int8")
    assert 1900 < figures.tokens < 4000


def test_texts_longer_than_the_context_are_cut(exact: Exported) -> None:
    long = np.random.default_rng(0).integers(0, 160, (2, 1000)).tolist()
    assert check_quantized(exact.path, exact.path, exact.config, long, format="int8").tokens >= 2 * 255


def test_every_format_has_limits() -> None:
    assert [row.name for row in FORMAT_SPECS.values()] == list(FORMATS)
    assert all(row.limits.kl > 0 for row in FORMAT_SPECS.values())


def test_enforce_names_member_figures_limits_and_remedy() -> None:
    bad = msgspec.structs.replace(FIGURES, kl=0.5)
    with pytest.raises(ParityError) as caught:
        enforce(bad, member="math")
    for part in ("'math'", "1000 tokens", "0.5", "0.02", "--force"):
        assert part in str(caught.value)


def test_enforce_lets_pass_what_is_within_or_forced() -> None:
    assert not enforce(FIGURES)
    assert not enforce(FIGURES, forced=True)
    assert enforce(msgspec.structs.replace(FIGURES, perplexity_ratio=2.0), forced=True)


def test_enforce_holds_graphs_to_their_limit() -> None:
    figures = GraphParity(prefill=1e-5, decode=1e-3, padded_batch=1e-5, limit=1e-4)
    with pytest.raises(ParityError, match=r"decode 0\.001 \(limit 0\.0001\)"):
        enforce(figures)
    assert enforce(figures, forced=True)
    assert not enforce(msgspec.structs.replace(figures, decode=1e-4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_cannot_be_forced(value: float) -> None:
    with pytest.raises(ParityError):
        enforce(msgspec.structs.replace(FIGURES, kl=value), forced=True)
