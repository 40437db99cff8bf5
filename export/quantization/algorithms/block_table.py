"""Blocks found by content: they connect a quantized torch model with its graph.

An algorithm that needs activations or gradients works on the torch model and leaves the blocks of each weight here.
When the graph is written, each matrix finds its blocks by the bytes of its rows, however the exporter named,
transposed, split or joined them.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from edgemix.errors import EdgemixError
from edgemix.export.quantization.algorithms.blocks import Blocks, concatenate
from edgemix.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.export.graphs.weights import Matrix


class BlockTable:
    """Blocks of matrices, found again whole or row by row."""

    def __init__(self) -> None:
        self._blocks: list[Blocks] = []
        self._digests: list[NDArray[np.uint8]] = []
        self._matrices: dict[bytes, int] = {}
        self._rows: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, matrix: Matrix, blocks: Blocks) -> None:
        """Store the blocks of a matrix [N, K]."""
        self._add(_digests(matrix), blocks)

    def _add(self, digests: NDArray[np.uint8], blocks: Blocks) -> None:
        index = len(self._blocks)
        self._blocks.append(blocks)
        self._digests.append(digests)
        self._matrices[digests.tobytes()] = index
        for row, digest in enumerate(digests):
            known = self._rows.get(digest.tobytes())
            # A row of several matrices (zeros, say) stays narrow, or one 8-bit row would widen a 4-bit matrix.
            if known is None or blocks.bits <= self._blocks[known[0]].bits:
                self._rows[digest.tobytes()] = index, row

    def find(self, matrix: Matrix) -> Blocks | None:
        """Return the blocks of a matrix [N, K] whose rows were added, in any order; None if a row is unknown.

        Where rows of 4 and of 8 bits meet in one matrix, it has 8 bits: that is exact.

        Raises:
            EdgemixError: Rows with blocks of different sizes are in one matrix.
        """
        digests = _digests(matrix)
        whole = self._matrices.get(digests.tobytes())
        if whole is not None:
            return self._blocks[whole]
        places = [self._rows.get(digest.tobytes()) for digest in digests]
        found = np.array([place for place in places if place is not None]).reshape(-1, 2)
        if len(found) < len(places):
            return None
        sources = np.unique(found[:, 0])
        if len({self._blocks[source].block for source in sources}) > 1:
            raise EdgemixError(
                f"the graph joins weights with blocks of different sizes, in a matrix {list(matrix.shape)}",
                "Choose a format that treats all layers alike, such as int8.",
            )
        by_source = [np.flatnonzero(found[:, 0] == source) for source in sources]
        parts = [self._blocks[source].rows(found[at, 1]) for source, at in zip(sources, by_source, strict=True)]
        return concatenate(parts).rows(np.argsort(np.concatenate(by_source)))

    def share(self, bits: int) -> float:
        """Return the share of all weights that have `bits` bits."""
        sizes = [blocks.codes.size for blocks in self._blocks]
        chosen = [blocks.codes.size for blocks in self._blocks if blocks.bits == bits]
        return sum(chosen) / max(sum(sizes), 1)

    def save(self, path: Path) -> None:
        """Write all blocks to one safetensors file."""
        tensors: dict[str, np.ndarray] = {}
        for index, blocks in enumerate(self._blocks):
            tensors[f"{index}.digests"] = self._digests[index]
            tensors[f"{index}.codes"], tensors[f"{index}.scales"] = blocks.codes, blocks.scales
            if blocks.zero_points is not None:
                tensors[f"{index}.zero_points"] = blocks.zero_points
        layouts = [[blocks.bits, blocks.columns, blocks.sums] for blocks in self._blocks]
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
            for i, layout in enumerate(layouts):
                parts = tensor(i, "codes"), tensor(i, "scales"), tensor(i, "zero_points")
                table._add(tensor(i, "digests"), Blocks(*parts, *layout))
        return table


def _digests(matrix: Matrix) -> NDArray[np.uint8]:
    """Return a digest of each row: uint8 [N, 16]."""
    digests = b"".join(blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(matrix))
    return np.frombuffer(digests, np.uint8).reshape(len(matrix), 16)
