"""What graphs are estimated to take, against graphs that were written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.tiny_models import tiny_model

from edgemix.export.budget.costs import block_bytes, member_costs
from edgemix.export.budget.plan import Cost
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.models.layout import layout
from edgemix.export.quantization import quantize
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.export.models.layout import Layout


@pytest.mark.parametrize("shape", [(48, 64), (33, 80), (17, 96), (8, 64)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_of_blocks(shape: tuple[int, int], bits: int, symmetric: bool) -> None:
    blocks = rtn(np.ones(shape, np.float32), bits=bits, block=32, symmetric=symmetric)
    zeros = blocks.packed_zero_points()
    stored = blocks.packed_codes().nbytes + blocks.scales.nbytes + (0 if zeros is None else zeros.nbytes)
    expected = 0 if min(shape) < 16 else stored
    assert block_bytes(*shape, bits=bits, block=32, zero_points=not symmetric) == expected


def size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.iterdir())


def eight_bit_table(parts: Layout, names: set[str], block: int) -> BlockTable:
    table = BlockTable()
    for name, part in parts.linears().items():
        if name in names:
            weight = part.weight.contiguous().numpy()
            table.add(weight, rtn(weight, bits=8, block=block, symmetric=False))
    return table


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("block", [32, 16])
def test_sizes_between_int4_and_int8_are_those_of_written_graphs(family: str, block: int, tmp_path: Path) -> None:
    model = tiny_model(family, vocab_size=300)
    parts = layout(model)
    source = export_graph(model, tmp_path / "fp32", target="cpu").path
    outputs = {weight_format: tmp_path / weight_format / "model.onnx" for weight_format in ("int4", "int8", "fp16")}
    for weight_format, output in outputs.items():
        quantize(source, output, weight_format, target="cpu", group=block)
    groups = [group for layer in parts.layers for group in layer.groups()]
    shapes = {name: tuple(part.weight.shape) for name, part in parts.linears().items()}
    losses = {name: {4: 1.0 + index, 8: 0.01} for index, name in enumerate(shapes)}
    graphs = {
        weight_format: Cost(size(output), seconds)
        for (weight_format, output), seconds in zip(outputs.items(), (3.0, 5.0, 9.0), strict=True)
    }
    found = member_costs("m", 0.5, graphs, groups=groups, shapes=shapes, losses=losses, block=block)
    assert found.mixed == Cost(graphs["int4"].bytes, 3.0, sum(loss[4] for loss in losses.values()))
    assert found.uniform["fp16"] == graphs["fp16"]
    for taken in (found.groups[:1], found.groups[1::2], found.groups):
        estimate = sum((group.eight_bits for group in taken), found.mixed)
        names = {name for group in taken for name in group.linears}
        output = tmp_path / "mixed" / "model.onnx"
        quantize(source, output, "int4", target="cpu", group=block, table=eight_bit_table(parts, names, block))
        assert size(output) == pytest.approx(estimate.bytes, rel=0.005)
        assert estimate.loss == pytest.approx(sum(loss[8 if name in names else 4] for name, loss in losses.items()))
    assert estimate.seconds == pytest.approx(5)
    assert estimate.loss == pytest.approx(found.uniform["int8"].loss)
