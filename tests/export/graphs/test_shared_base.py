"""Members in one graph: each row is that member's own graph, and what is no low-rank addition is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.graphs.deltas import find_deltas, low_rank
from edgemix.export.graphs.shared_base import add_members

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

RANK = 3


def fine_tuned(base: PreTrainedModel, seed: int, *, but: str = "") -> PreTrainedModel:
    """The base with a random addition of rank `RANK` in every linear of its layers, but for those with a name."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.base_model.named_modules():
            if isinstance(module, torch.nn.Linear) and not (but and but in name):
                up, down = (torch.randn(size, RANK, generator=generator) * 0.1 for size in module.weight.shape)
                module.weight += up @ down.T
    return model


def graph_of(model: PreTrainedModel, folder: Path) -> Path:
    export_graph(model, folder, target="cpu")
    return folder / "model.onnx"


def run(path: Path, steps: list[np.ndarray], keep: int | None = None) -> list[np.ndarray]:
    """Logits of every step, each after the ones before, in a shared cache of 64 slots."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = np.prod(session.get_outputs()[0].shape[2:-1], dtype=int)
    shapes = {
        tensor.name: (rows, tensor.shape[1], 64, tensor.shape[3])
        for tensor in session.get_inputs()
        if tensor.name.startswith("past")
    }
    cache = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    read, found = 0, []
    for ids in steps:
        binding = session.io_binding()
        binding.bind_output("logits", "cpu")
        read += ids.shape[1]
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, read), np.int64))
        if keep is not None:
            binding.bind_ortvalue_input("logits_to_keep", ort.OrtValue.ortvalue_from_numpy(np.array([keep])))
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        session.run_with_iobinding(binding)
        found.append(binding.get_outputs()[0].numpy())
    return found


def stacked(base: Path, members: list[Path], output: Path, most: int = 16) -> Path:
    model = ir.load(base)
    deltas = find_deltas(model.graph, [ir.load(member).graph for member in members], most)
    add_members(model.graph, deltas, len(members))
    output.parent.mkdir()
    ir.save(model, output, external_data="model.onnx.data")
    return output


IDS = np.random.default_rng(0).integers(3, 150, (1, 20))
STEPS = [IDS[:, :9], IDS[:, 9:10], IDS[:, 10:15], IDS[:, 15:16], IDS[:, 16:]]
"""A prompt, tokens one by one, several after a past."""


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "phi3", "qwen3", "gpt_neox"])
def test_each_member_of_a_shared_graph_computes_its_own_graphs_logits(architecture: str, tmp_path: Path) -> None:
    base = tiny_model(architecture)
    models = [fine_tuned(base, 1), base, fine_tuned(base, 2)]
    paths = [graph_of(model, tmp_path / str(i)) for i, model in enumerate(models)]
    path = stacked(paths[1], paths, tmp_path / "stack" / "model.onnx")
    expected = [run(each, STEPS) for each in paths]
    for step, logits in enumerate(run(path, STEPS)):
        assert logits.shape[:3] == (1, STEPS[step].shape[1], 3)
        for row, own in enumerate(expected):
            np.testing.assert_allclose(logits[:, :, row], own[step], rtol=1e-3, atol=2e-4)
    for step, logits in enumerate(run(path, STEPS, keep=2)):
        for row, own in enumerate(expected):
            np.testing.assert_allclose(logits[:, :, row], own[step][:, -2:], rtol=1e-3, atol=2e-4)


def test_low_rank_additions_are_found_with_their_rank(tmp_path: Path) -> None:
    base = tiny_model("llama")
    paths = [graph_of(model, tmp_path / str(i)) for i, model in enumerate([base, fine_tuned(base, 1, but="down")])]
    own, other = (ir.load(path).graph for path in paths)
    found = find_deltas(own, [own, other], 64)
    ranks = {name.split(".")[-2]: [delta.rank for delta in deltas] for name, deltas in found.items()}
    assert not any("down_proj" in name for name in found)
    assert ranks["o_proj"] == ranks["gate_proj"] == [0, RANK]
    assert max(rank for both in ranks.values() for rank in both) == 3 * RANK  # queries, keys and values are one


def test_low_rank_is_the_best_approximation() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((60, 12)) @ rng.standard_normal((12, 40))).astype(np.float32)
    exact = low_rank(matrix, 16, 1e-5)
    assert exact.rank == 12
    np.testing.assert_allclose(exact.up @ exact.down, matrix, atol=1e-4)
    left, values, right = np.linalg.svd(matrix)
    best = (left[:, :5] * values[:5]) @ right[:5]
    cut = low_rank(matrix, 5, 1e-5)
    assert cut.rank == 5
    np.testing.assert_allclose(np.linalg.norm(cut.up @ cut.down - matrix), np.linalg.norm(best - matrix), rtol=1e-3)


def test_members_with_another_norm_cannot_share_a_graph(tmp_path: Path) -> None:
    base, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.norm.weight += 0.1
    graphs = [ir.load(graph_of(model, tmp_path / str(i))).graph for i, model in enumerate([base, other])]
    with pytest.raises(InputError, match=r"norm\.weight differs"):
        find_deltas(graphs[0], graphs[1:], 16)
