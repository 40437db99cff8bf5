"""The roofline model (Williams et al. 2009): a call takes at least the time to read its bytes from memory, and at least
the time of its multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgemix.formats import FORMAT_SPECS
from edgemix.results.profile import RooflinePoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.formats import Format
    from edgemix.results.profile import Machine
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.profiling.graphs import Graph


@dataclass(frozen=True, slots=True)
class Work:
    """The bytes and multiply-adds of a graph.

    Attributes:
        weights: Bytes of weights that every call reads.
        state: Bytes of keys and values per token.
        products: Multiply-adds per token.
        attention: Multiply-adds per token for each token before it.
        int8: Whether products are computed in 8 bits.
    """

    weights: int
    state: int
    products: int
    attention: int
    int8: bool

    @classmethod
    def of(cls, graph: Graph, decoder: DecoderGraph, format_: Format) -> Work:
        """Return the work of a member's graph."""
        slots = decoder.layout.slots
        numbers = sum(slot.heads * slot.head_size for slot in slots)
        size = slots[0].head_size if slots else 0
        return cls(
            weights=graph.weight_bytes(),
            state=numbers * decoder.layout.dtype.itemsize,
            products=decoder.member_count * graph.multiply_adds(),
            attention=2 * decoder.member_count * graph.query_heads * size or numbers,
            int8=FORMAT_SPECS[format_].integer_products,
        )

    def bytes(self, tokens: int, context: int) -> int:
        """Return the bytes read by a call of `tokens` tokens after a context: weights, keys and values, each once."""
        return self.weights + self.state * (tokens + context)

    def operations(self, tokens: int, context: int) -> int:
        """Return the multiply-adds of such a call: every token attends to those before it and itself."""
        return tokens * self.products + self.attention * (tokens * context + tokens * (tokens + 1) // 2)


def roofline_point(
    phase: Literal["prefill", "decode"],
    works: Sequence[Work],
    machine: Machine,
    *,
    tokens: int,
    context: int,
    seconds: float,
) -> RooflinePoint | None:
    """Return the roofline point of a call of `tokens` tokens of one graph, or of several in sequence; None where no
    limit of the machine is known.
    """
    read = sum(work.bytes(tokens, context) for work in works)
    memory = read / machine.bandwidth if machine.bandwidth else 0.0
    compute = 0.0
    for work in works:
        peak = machine.int8_peak if work.int8 and machine.int8_peak else machine.fp32_peak
        compute += work.operations(tokens, context) / peak if peak else 0.0
    if not memory and not compute:
        return None
    return RooflinePoint(
        phase=phase,
        bytes=read,
        operations=sum(work.operations(tokens, context) for work in works),
        tokens=tokens,
        floor=max(memory, compute),
        bound="memory" if memory >= compute else "compute",
        seconds=seconds,
    )
