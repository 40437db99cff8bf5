"""Costs of a member in each format: bytes and seconds of graphs that were written and run, and interpolations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.export.budget.plan import Cost, Group, MemberCosts
from edgemix.export.graphs.weights import SMALLEST
from edgemix.formats import BLOCK_FORMATS, FORMAT_SPECS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.formats import Format

_INT8_BLOCK = 32
"""Block size of the format int8, whatever int4 has."""


def block_bytes(rows: int, columns: int, *, bits: int, block: int, zero_points: bool) -> int:
    """Bytes of a matrix [rows, columns] in blocks, as a graph holds them: codes, scales and, if stored, zero points."""
    if min(rows, columns) < SMALLEST:
        return 0
    blocks = -(-columns // block)
    zeros = -(-blocks * bits // 8) if zero_points else 0
    return rows * (blocks * (block * bits // 8 + 2) + zeros)


def member_costs(
    name: str,
    weight: float,
    graphs: Mapping[Format, Cost],
    *,
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
    losses: Mapping[str, Mapping[int, float]],
    block: int,
    sparse: bool = False,
) -> MemberCosts:
    """Put together what was measured and estimated of a member.

    Decoding reads each weight once, and MatMulNBits takes the same time for each byte more: of SmolLM2-135M's products
    (576 x 576, 192 x 576, 1536 x 576, 576 x 1536; AVX512-VNNI, 1 thread) 61 to 72 us a MB from 4 to 8 bits. So the time
    between int4 and int8 is shared out by bytes.

    Args:
        name: The member's.
        weight: Its share of the mixture.
        graphs: Bytes on disk and seconds of its int4 graph with 4 bits everywhere, its int8 graph, and perhaps others.
        groups: Names of the linears that must have the same bits.
        shapes: [out, in] of each linear.
        losses: Of each linear by bits, nats a token; see `sensitivity.quantization_costs`.
        block: Inputs that share a scale in int4.
        sparse: Whether graphs are stored without their zeros.
    """
    int4, int8 = graphs[BLOCK_FORMATS[4]], graphs[BLOCK_FORMATS[8]]

    def size(each: str, bits: int, *, block: int = block, zero_points: bool = True) -> int:
        return block_bytes(*shapes[each], bits=bits, block=block, zero_points=zero_points)

    more = {each: size(each, 8) - size(each, 4) for each in shapes}
    plain = sum(size(each, 8, block=_INT8_BLOCK, zero_points=False) - size(each, 4) for each in shapes)
    stored = (int8.bytes - int4.bytes) / plain if sparse else 1.0
    rate = (int8.seconds - int4.seconds) / max(sum(more.values()), 1)
    parts = []
    for group in groups:
        larger = sum(more[each] for each in group)
        loss = sum(losses[each][8] - losses[each][4] for each in group)
        parts.append(Group(tuple(group), Cost(round(stored * larger), rate * larger, loss)))
    lost = {bits: sum(each[bits] for each in losses.values()) for bits in (4, 8)}
    uniform = {each: cost + Cost(loss=_loss(each, lost)) for each, cost in graphs.items() if each != BLOCK_FORMATS[4]}
    return MemberCosts(name, weight, int4 + Cost(loss=lost[4]), tuple(parts), uniform)


def _loss(weight_format: Format, lost: Mapping[int, float]) -> float:
    """Estimate the loss of a whole member in a format from that of blocks, by bits."""
    row = FORMAT_SPECS[weight_format]
    return 0.0 if row.floating_point else lost[max(bits for bits in lost if bits <= row.bits)]
