"""The student's graph for drafts: the whole graph's logits of some tokens, and no weight twice."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.quantized_graphs import VOCABULARY, run, shrink, write_decoder
from helpers.tiny_models import tiny_model
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.external_data import external_files, external_tensors
from edgemix.bundle.manifest import GraphParity
from edgemix.export.drafting.draft_head import GRAPH_FILE, cut_head, draft_size, frequent_tokens
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.quantization import EMITTERS
from edgemix.formats import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.formats import Format, Target

TOKENS = np.array([0, 1, 2, 7, 8, 30, 31, 40, 41, 42, 43, 44, 61, 62, 68, 69])
PLACES = [
    (weight_format, target)
    for weight_format in EMITTERS
    for target in TARGETS
    if (weight_format, target) != ("int8-dynamic", "cuda")
]


@pytest.mark.parametrize(
    ("vocabulary", "size"), [(16_383, 0), (16_384, 4_096), (32_000, 8_000), (49_152, 8_192), (17_000, 4_224)]
)
def test_the_size_of_the_head(vocabulary: int, size: int) -> None:
    assert draft_size(vocabulary) == size


def test_frequent_tokens() -> None:
    """By hand: shares 5: 1.0, 2: 0.5 + 0.25, 3: 0.25; then the lowest ids that never come; 9 in any case."""
    domains = [[[2] * 50 + [5] * 50, [5] * 100], [[2, 5, 5, 3]]]
    find = partial(frequent_tokens, domains, 10)
    assert find(2).tolist() == [2, 5]
    assert find(3, always=[9]).tolist() == [2, 5, 9]
    assert find(6, always=[9]).tolist() == [0, 1, 2, 3, 5, 9]
    assert find(2, always=[9, 8]).tolist() == [8, 9]


def check_cut(folder: Path, atol: float) -> None:
    """The cut graph beside model.onnx: its logits, its own size, and where its other weights lie."""
    whole, cut = folder / "model.onnx", folder / GRAPH_FILE
    assert cut_head(whole, cut, TOKENS)
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 69, 0]])
    expected, found = run(whole, ids), run(cut, ids)
    assert found["logits"].dtype == expected["logits"].dtype
    for name, array in found.items():
        np.testing.assert_allclose(
            array, expected[name][..., TOKENS] if name == "logits" else expected[name], atol=atol
        )
    assert external_files(cut) == external_files(whole) == {"model.onnx.data"}
    assert set(external_tensors(cut)) <= set(external_tensors(whole))
    assert sorted(path.name for path in folder.iterdir()) == sorted([GRAPH_FILE, "model.onnx", "model.onnx.data"])
    logits = next(value for value in ir.load(cut).graph.outputs if value.name == "logits")
    assert logits.shape[-1] == len(TOKENS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("weight_format", "target"), PLACES)
def test_logits_are_those_of_the_whole_graph(weight_format: Format, target: Target, tied: bool, tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    shrink(write_decoder(tmp_path, tied=tied), tmp_path / "stored/model.onnx", weight_format, target)
    check_cut(tmp_path / "stored", 1e-3 if target == "cuda" and weight_format != "fp32" else 1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads as exporters write them: tied, own, under a cap, behind a growing cache, with a bias, scaled."""
    folder = tmp_path_factory.mktemp("exported")
    options = {
        "llama-tied": {},
        "gemma2": {"final_logit_softcapping": 20.0},
        "llama-head-20": {},
        "phi": {},
        "granite": {"logits_scaling": 3.0},
    }
    exact = GraphParity(prefill=0, decode=0, padded_batch=0, limit=1)
    return {
        name: export_graph(
            tiny_model(name, vocab_size=VOCABULARY, **differing),
            folder / name,
            target="cpu",
            gate=lambda _path, _config: exact,
        ).path
        for name, differing in options.items()
    }


@pytest.mark.parametrize("weight_format", EMITTERS)
@pytest.mark.parametrize("model", ["llama-tied", "gemma2", "llama-head-20", "phi", "granite"])
def test_heads_of_exported_models_are_cut(
    model: str, weight_format: Format, exported: dict[str, Path], tmp_path: Path
) -> None:
    shrink(exported[model], tmp_path / "model.onnx", weight_format)
    check_cut(tmp_path, 1e-5)


def test_only_the_head_is_stored_again(tmp_path: Path) -> None:
    """An int4 graph's head has 8 bits, and a table that is tied to it stays whole for lookups."""
    shrink(write_decoder(tmp_path, tied=True), tmp_path / "stored/model.onnx", "int4")
    assert cut_head(tmp_path / "stored/model.onnx", tmp_path / "stored" / GRAPH_FILE, TOKENS)
    whole, cut = (ir.load(tmp_path / "stored" / name).graph for name in ("model.onnx", GRAPH_FILE))
    new = {name: value.const_value for name, value in cut.initializers.items() if name not in whole.initializers}
    assert sorted(tensor.shape[0] for tensor in new.values()) == [len(TOKENS)] * 2  # codes and scales
    assert cut.initializers.keys() - new.keys() == whole.initializers.keys()


@pytest.mark.parametrize("change", ["softmax", "read twice", "reshape", "no constant"])
def test_a_head_of_unknown_structure_is_left_alone(change: str, tmp_path: Path) -> None:
    path = write_decoder(tmp_path, tied=False)
    model = onnx.load(path)
    nodes = model.graph.node
    if change == "softmax":
        nodes[-1].CopyFrom(helper.make_node("Softmax", ["capped"], ["logits"]))
    elif change == "read twice":
        model.graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["b", "s", VOCABULARY]))
        nodes.append(helper.make_node("Identity", ["raw"], ["again"]))
        model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["b", "s", VOCABULARY]))
    elif change == "reshape":
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, -1, VOCABULARY]), "whole"))
        nodes[-1].CopyFrom(helper.make_node("Reshape", ["capped", "whole"], ["logits"]))
    else:
        product = next(node for node in nodes if list(node.output) == ["raw"])
        product.input[1] = "made"
        nodes.insert(0, helper.make_node("Sigmoid", ["head"], ["made"]))
    onnx.save(model, path)
    assert not cut_head(path, tmp_path / GRAPH_FILE, TOKENS)
    assert not (tmp_path / GRAPH_FILE).exists()
