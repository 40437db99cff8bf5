"""Keys and values in 8 bits: a quarter of the memory, nearly the same text, however it is read."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.errors import EdgemixError, InputError, RecipeError
from edgemix.export.budget.plan import ResourceBudget
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.pipeline import export_bundle
from edgemix.export.quantization import quantize
from edgemix.export.quantization.graph.key_value import cache_scales
from edgemix.recipe.compression import Student
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.runtime import Mixture
from edgemix.runtime.graphs.decoder import DecoderGraph

WINDOWS = np.random.default_rng(0).integers(0, 96, (8, 64))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The fp32 graph of a model, and the same with keys and values in 8 bits."""
    folder = tmp_path_factory.mktemp("graphs")
    made = export_graph(tiny_model("llama", vocab_size=96), folder / "float", target="cpu")
    source, output = folder / "float/model.onnx", folder / "int8/model.onnx"
    quantize(source, output, "fp32", target="cpu", cache=cache_scales(source, made.config, WINDOWS.tolist()))
    codes = msgspec.structs.replace(made.config, cache_dtype="int8")
    return DecoderGraph.load(source, made.config), DecoderGraph.load(output, codes)


def test_it_says_nearly_the_same(graphs):
    plain, coded = (member.forward(WINDOWS[:2])[1] for member in graphs)
    assert 0 < np.abs(coded - plain).max() < 0.05 * plain.std()


def test_state_takes_a_quarter(graphs):
    sizes = []
    for member in graphs:
        cache = member.new_cache()
        member.extend(cache, WINDOWS[:1])
        sizes.append(cache.bytes)
    assert sizes[0] == 4 * sizes[1]


def test_however_it_is_read(graphs):
    _, member = graphs
    whole = member.extend_all(member.new_cache(), WINDOWS[:1])[0].copy()
    cache = member.new_cache()
    parts = [
        member.extend_all(cache, WINDOWS[:1, at : at + step])[0].copy() for at, step in ((0, 40), (40, 1), (41, 23))
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
    cache.rollback([30])
    (again,) = member.extend_all(cache, WINDOWS[:1, 30:])
    np.testing.assert_allclose(again, whole[30:], atol=1e-4)
    both = member.new_cache(2)
    member.extend(both, [WINDOWS[0, :20], WINDOWS[1, :35]])
    last = member.extend(both, [[5], [6]])
    alone = member.extend(member.new_cache(), [[*WINDOWS[0, :20], 5]])
    np.testing.assert_allclose(last[0], alone[0], atol=1e-4)


def test_a_scale_is_set_by_the_largest_number(graphs, tmp_path):
    plain, _ = graphs
    model = export_graph(tiny_model("llama", vocab_size=96), tmp_path / "float", target="cpu")
    scales = cache_scales(tmp_path / "float/model.onnx", model.config, WINDOWS[:1].tolist())
    cache = plain.new_cache()
    plain.extend(cache, WINDOWS[:1])
    for slot, state in zip(plain.layout.slots, cache.state(64), strict=True):
        np.testing.assert_allclose(scales[slot.past][0, :, 0] * 127, np.abs(state).max(axis=1), rtol=1e-6)


def test_on_cuda_too_scales_stay_in_float32(tmp_path):
    """The graph of the other target differs in its floats only."""
    made = export_graph(tiny_model("llama", vocab_size=96), tmp_path / "float", target="cuda")
    source, output = tmp_path / "float/model.onnx", tmp_path / "int8/model.onnx"
    quantize(source, output, "int4", target="cuda", cache=cache_scales(source, made.config, WINDOWS.tolist()))
    node = next(node for node in ir.load(output).graph if node.op_type == "GroupQueryAttention")
    assert [value.dtype for value in node.inputs[3:5]] == [ir.DataType.INT8] * 2
    assert [value.dtype for value in node.inputs[12:14]] == [ir.DataType.FLOAT] * 2
    member = DecoderGraph.load(output, msgspec.structs.replace(made.config, dtype="float16", cache_dtype="int8"))
    assert np.isfinite(member.forward(WINDOWS[:1])[0]).all()


def test_a_cache_that_grows_has_no_codes(tmp_path):
    made = export_graph(tiny_model("bloom", vocab_size=96), tmp_path / "float", target="cpu")
    with pytest.raises(InputError, match="cannot be int8"):
        cache_scales(tmp_path / "float/model.onnx", made.config, WINDOWS.tolist())


@pytest.fixture
def recipe(tmp_path):
    for number, name in enumerate(("one", "two")):
        tiny_model("llama", vocab_size=288, rms_norm_eps=1e-5 * (number + 1)).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    members = (MemberRecipe("one", "one"), MemberRecipe("two", "two", format="int4"))
    text = Data(calibration={"prose": TextSource("text.txt")}, max_tokens=600)
    return Recipe(members, cache="int8", data=text, folder=tmp_path)


def test_a_whole_mixture(recipe, tmp_path):
    recipe = msgspec.structs.replace(recipe, quantization=msgspec.structs.replace(recipe.quantization, algorithm="rtn"))
    manifest = export_bundle(recipe, tmp_path / "bundle")
    assert [member.config.cache_dtype for member in manifest.members] == ["int8", "int8"]
    export_bundle(msgspec.structs.replace(recipe, cache="float"), tmp_path / "plain")
    text = "the quick brown fox jumps over the lazy"
    with Mixture.load(tmp_path / "bundle", "cpu") as mixture, Mixture.load(tmp_path / "plain", "cpu") as plain:
        p, q = (each.next_token_distribution(text) for each in (plain, mixture))
        assert 0 < (p * np.log(p / q)).sum() < 0.01
        single = mixture.generate(text, max_new_tokens=12)
        assert mixture.generate([text, "fox"], max_new_tokens=12)[0].token_ids == single.token_ids
        assert mixture.generate(text, max_new_tokens=12, speculation="off").token_ids == single.token_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": True}, "does not go with stack"),
        ({"format": "fp16"}, "goes with quantized formats"),
        ({"student": Student(format="fp32")}, "goes with quantized formats"),
    ],
)
def test_what_it_does_not_go_with(recipe, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        export_bundle(msgspec.structs.replace(recipe, **change), tmp_path / "bundle")


def test_what_it_does_to_a_graph_is_the_same_every_time(tmp_path):
    made = export_graph(tiny_model("llama", vocab_size=96), tmp_path / "float", target="cpu")
    source = tmp_path / "float/model.onnx"
    contents = []
    for name in ("a", "b"):
        quantize(
            source,
            tmp_path / name / "model.onnx",
            "int8",
            target="cpu",
            cache=cache_scales(source, made.config, WINDOWS.tolist()),
        )
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]


def test_a_runtime_that_is_too_old_says_so(graphs, tmp_path, monkeypatch):
    _, member = graphs
    monkeypatch.setattr("onnxruntime.__version__", "1.25.1")
    with pytest.raises(EdgemixError, match=r"needs ONNX Runtime 1\.32 or later, and this is 1\.25\.1"):
        DecoderGraph.load(tmp_path / "model.onnx", member.config)


def test_a_budget_tries_formats_with_floats(recipe, tmp_path):
    with pytest.raises(InputError, match="a budget does not go with cache: int8"):
        export_bundle(recipe, tmp_path / "bundle", budget=ResourceBudget(bytes=10**9))
