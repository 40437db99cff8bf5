"""Blocks found by content: the way from a quantised torch model to its graph.

An algorithm that needs activations or gradients works on the torch model: it leaves every weight equal to what its
blocks stand for, and the blocks here. When the graph is written, each matrix finds its blocks by the bytes of its rows,
however the exporter named, transposed, split or joined them.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from edgemix.bundle import write_atomically
from edgemix.errors import EdgemixError
from edgemix.export.quantization.blocks import Blocks

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from edgemix.export.quantization.blocks import Matrix


class BlockTable:
    """Blocks of matrices, found again row by row."""

    def __init__(self, blocks: Iterable[Blocks] = ()) -> None:
        self._blocks: list[Blocks] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        for each in blocks:
            self.add(each)

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, blocks: Blocks) -> Matrix:
        """Keep blocks; returns the matrix [N, K] they stand for, which the model's weight must be set to."""
        matrix = blocks.dequantized()
        for row, digest in enumerate(_digests(matrix)):
            self._rows[digest] = len(self._blocks), row
        self._blocks.append(blocks)
        return matrix

    def find(self, matrix: Matrix) -> Blocks | None:
        """The blocks of a matrix [N, K] whose rows were added, in any order; None if none of them was.

        Raises:
            EdgemixError: Some rows were added and others not, or rows of different layouts are in one matrix.
        """
        places = [self._rows.get(digest) for digest in _digests(matrix)]
        found = [place for place in places if place is not None]
        if not found:
            return None
        layouts = {_layout(self._blocks[index]) for index, _ in found}
        if len(found) < len(places) or len(layouts) > 1:
            raise EdgemixError(
                f"the graph joins weights that were quantised in different ways, in a matrix {list(matrix.shape)}",
                "Choose a format that treats all layers alike, such as int8.",
            )
        # Most matrices are one Blocks, whole and in order.
        index = found[0][0]
        if found == [(index, row) for row in range(len(self._blocks[index].codes))]:
            return self._blocks[index]
        rows = [self._row(index, row) for index, row in found]
        return Blocks(
            np.concatenate([each.codes for each in rows]),
            np.concatenate([each.scales for each in rows]),
            None if rows[0].zero_points is None else np.concatenate([each.zero_points for each in rows]),
            rows[0].bits,
            rows[0].columns,
        )

    def save(self, path: Path) -> None:
        """Write all blocks to one safetensors file."""
        tensors: dict[str, np.ndarray] = {}
        for index, blocks in enumerate(self._blocks):
            tensors[f"{index}.codes"], tensors[f"{index}.scales"] = blocks.codes, blocks.scales
            if blocks.zero_points is not None:
                tensors[f"{index}.zero_points"] = blocks.zero_points
        layouts = [[blocks.bits, blocks.columns] for blocks in self._blocks]
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        write_atomically(path, safetensors.numpy.save(tensors, {"layouts": json.dumps(layouts)}))

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """Read what `save` wrote."""
        with safetensors.safe_open(path, "numpy") as file:
            layouts = json.loads(file.metadata()["layouts"])
            names = set(file.keys())

            def tensor(index: int, kind: str) -> Any:
                return file.get_tensor(f"{index}.{kind}") if f"{index}.{kind}" in names else None

            return cls(
                Blocks(tensor(i, "codes"), tensor(i, "scales"), tensor(i, "zero_points"), bits, columns)
                for i, (bits, columns) in enumerate(layouts)
            )

    def _row(self, index: int, row: int) -> Blocks:
        blocks, part = self._blocks[index], slice(row, row + 1)
        zero_points = None if blocks.zero_points is None else blocks.zero_points[part]
        return Blocks(blocks.codes[part], blocks.scales[part], zero_points, blocks.bits, blocks.columns)


def _layout(blocks: Blocks) -> tuple[int, int, int, bool]:
    return blocks.bits, blocks.block, blocks.columns, blocks.zero_points is None


def _digests(matrix: Matrix) -> list[bytes]:
    # Adding zero makes -0.0 and 0.0 the same bytes.
    return [blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(matrix) + np.float32(0)]
