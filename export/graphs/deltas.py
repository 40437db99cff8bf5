"""Find the low-rank additions to a base's linears by which members of one structure differ from it.

A member that was fine-tuned with LoRA is its base plus a product of low-rank matrices in every linear, and the singular
value decomposition of the difference finds that product again, however the adapter named and scaled it. A full
fine-tune has no such rank; the largest singular values are the best approximation that a rank allows (Eckart and Young,
1936), and the parity gate decides whether that is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from edgemix.errors import InputError
from edgemix.export.graphs.weights import head, linears

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from edgemix.export.graphs.weights import Matrix

NEGLIGIBLE = 1e-6
"""A difference this small, in units of the weight that differs, is rounding."""

_SPARE = 8
"""Singular vectors beyond the wanted rank: a randomized decomposition is then exact (Halko et al., arXiv 0909.4061)."""
_POWERS = 4
_FIRST = 24
"""Rank that is tried first: most adapters have less, and a decomposition's time grows with its rank."""


class Delta(NamedTuple):
    """A member's addition to a linear's weight: up @ down.

    Attributes:
        down: float32 [rank, K].
        up: float32 [N, rank].
    """

    down: Matrix
    up: Matrix

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return len(self.down)


def find_deltas(base: ir.Graph, members: Sequence[ir.Graph], max_rank: int) -> dict[str, list[Delta]]:
    """Find the members' additions to a base, by the name of the base's weight: one a member, perhaps of rank 0.

    Args:
        base: The base's fp32 graph.
        members: The members' fp32 graphs, made the same way.
        max_rank: Largest rank; a larger one is cut off.

    Raises:
        InputError: Something else differs: the structure, an embedding, a norm's gain, the head.
    """
    last = head(base)
    weights = {linear.weight.name: linear for linear in linears(base) if last is None or linear.node is not last.node}
    own = [_differing(base, member) for member in members]
    for name in sorted({name for names in own for name in names} - weights.keys()):
        raise InputError(f"{name} differs between the members, and is no linear of their layers")
    found: dict[str, list[Delta]] = {}
    for name in sorted({name for names in own for name in names}):
        linear = weights[name]
        shared = linear.matrix()
        matrices = (_matrix(member, name, transposed=linear.transposed) for member in members)
        found[name] = [
            low_rank(matrix - shared, max_rank, NEGLIGIBLE * float(np.abs(shared).max())) for matrix in matrices
        ]
    return found


def low_rank(difference: Matrix, max_rank: int, negligible: float = 0.0) -> Delta:
    """Approximate a matrix by the product of smallest rank, up to `max_rank`, that is closest to it.

    Args:
        difference: float32 [N, K].
        max_rank: Largest rank.
        negligible: Size of the entries of a difference that is only rounding, and needs no rank.
    """
    matrix = torch.from_numpy(difference)
    # A matrix of independent entries of that size has singular values up to about this.
    floor = negligible * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
    wanted = min(_FIRST if floor else max_rank, max_rank)
    while True:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=min(wanted + _SPARE, *matrix.shape), niter=_POWERS)
        rank = min(max_rank, int((values > floor).sum()))
        if rank < wanted or wanted == max_rank:
            break
        wanted = min(2 * wanted, max_rank)
    root = values[:rank].sqrt()
    return Delta((root[:, None] * right[:, :rank].T).numpy(), (left[:, :rank] * root).numpy())


def _differing(base: ir.Graph, member: ir.Graph) -> list[str]:
    """Return the names of the initializers that differ."""
    if _structure(base) != _structure(member):
        raise InputError("the members' graphs differ in structure")
    pairs = ((name, _array(base, name), _array(member, name)) for name in base.initializers)
    return [name for name, ours, theirs in pairs if not np.array_equal(ours, theirs)]


def _structure(graph: ir.Graph) -> list[object]:
    shapes: Mapping[str, object] = {name: tuple(value.const_value.shape) for name, value in graph.initializers.items()}
    return [
        sorted(shapes.items()),
        [(node.op_type, [value and value.name for value in node.inputs]) for node in graph],
    ]


def _array(graph: ir.Graph, name: str) -> np.ndarray:
    array: np.ndarray = graph.initializers[name].const_value.numpy()
    return array


def _matrix(graph: ir.Graph, name: str, *, transposed: bool) -> Matrix:
    stored = _array(graph, name)
    return np.ascontiguousarray(stored if transposed else stored.T)
