"""Blocks found by content: the way from a quantised torch model to its graph.

An algorithm that needs activations or gradients works on the torch model and leaves the blocks of each weight here.
When the graph is written, each matrix finds its blocks by the bytes of its rows, however the exporter named, turned,
split or joined them.
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
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.export.quantization.blocks import Matrix


class BlockTable:
    """Blocks of matrices, found again row by row."""

    def __init__(self) -> None:
        self._blocks: list[Blocks] = []
        self._digests: list[NDArray[np.uint8]] = []
        self._rows: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, matrix: Matrix, blocks: Blocks) -> None:
        """Keep the blocks of a matrix [N, K]."""
        self._add(_digests(matrix), blocks)

    def _add(self, digests: NDArray[np.uint8], blocks: Blocks) -> None:
        for row, digest in enumerate(digests):
            self._rows[digest.tobytes()] = len(self._blocks), row
        self._blocks.append(blocks)
        self._digests.append(digests)

    def find(self, matrix: Matrix) -> Blocks | None:
        """The blocks of a matrix [N, K] whose rows were added, in any order; None if none of them was.

        Raises:
            EdgemixError: Some rows were added and others not, or rows of different layouts are in one matrix.
        """
        places = [self._rows.get(digest.tobytes()) for digest in _digests(matrix)]
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
            tensors[f"{index}.digests"] = self._digests[index]
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

            table = cls()
            for i, (bits, columns) in enumerate(layouts):
                parts = tensor(i, "codes"), tensor(i, "scales"), tensor(i, "zero_points")
                table._add(tensor(i, "digests"), Blocks(*parts, bits, columns))
        return table

    def _row(self, index: int, row: int) -> Blocks:
        blocks, part = self._blocks[index], slice(row, row + 1)
        zero_points = None if blocks.zero_points is None else blocks.zero_points[part]
        return Blocks(blocks.codes[part], blocks.scales[part], zero_points, blocks.bits, blocks.columns)


def _layout(blocks: Blocks) -> tuple[int, int, int, bool]:
    return blocks.bits, blocks.block, blocks.columns, blocks.zero_points is None


def _digests(matrix: Matrix) -> NDArray[np.uint8]:
    """uint8 [N, 16], of each row."""
    digests = b"".join(blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(matrix))
    return np.frombuffer(digests, np.uint8).reshape(len(matrix), 16)
