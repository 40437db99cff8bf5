"""The names, axes and dtypes of graphs' tensors: what exporters write and the runtime binds.

Of a decoder:

    input_ids                    int64 [batch, sequence]
    attention_mask               int64 [batch, past + sequence], 1 for a slot that holds a token, 0 for padding
    position_ids                 int64 [batch, sequence]; absent where the graph derives positions from the mask
    past_key_values.{i}.key      float or int8 [batch, kv_heads, past, head_size], and .value
    logits_to_keep               int64 [1], number of last tokens to compute logits for; optional, default all
    logits                       float [batch, kept, vocabulary]; of several members [batch, kept, members, vocabulary]
    present.{i}.key              float or int8 [batch, kv_heads, past + sequence, head_size], and .value

In a graph of several members, keys and values are [batch * members, ...]: a text's rows, one member after the other.
Of an encoder with its head:

    input_ids, attention_mask    int64 [batch, sequence], 1 for a token, 0 for padding on either side
    token_type_ids               int64 [batch, sequence]; absent where the model has none
    logits                       float [batch, labels], or [batch, sequence, labels] with a label for each token

`past`, `sequence`, `kept` and `batch` are dynamic; kv_heads, head_size and vocabulary are fixed in the graph, and the
runtime reads them there. How the cache moves from one call to the next is the graph's `CacheKind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from edgemix.tasks import GraphKind

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - a tensor
LOGITS_TO_KEEP = "logits_to_keep"
LOGITS = "logits"
PAST_PREFIX = "past_key_values."
PRESENT_PREFIX = "present."


@dataclass(frozen=True)
class GraphTensors:
    """The inputs and outputs of a kind of graph, but for its state and for optional inputs with a default value.

    Attributes:
        inputs: Inputs that every graph has.
        optional_inputs: Inputs that a graph may have.
        outputs: Outputs that every graph has.
        stateful: Whether each layer has a state: a past key and value as inputs, a present one as outputs.
    """

    inputs: frozenset[str]
    optional_inputs: frozenset[str]
    outputs: frozenset[str]
    stateful: bool

    @property
    def min_layers(self) -> int:
        """Smallest number of layers with a state."""
        return 1 if self.stateful else 0

    def past_inputs(self, layers: int) -> frozenset[str]:
        """Return the names of the inputs that hold the state of `layers` layers."""
        return frozenset(name(layer) for layer in range(layers) for name in (past_key, past_value))


GRAPH_TENSORS: dict[GraphKind, GraphTensors] = {
    "decoder": GraphTensors(
        inputs=frozenset({INPUT_IDS, ATTENTION_MASK}),
        optional_inputs=frozenset({POSITION_IDS}),
        outputs=frozenset({LOGITS}),
        stateful=True,
    ),
    "encoder": GraphTensors(
        inputs=frozenset({INPUT_IDS, ATTENTION_MASK}),
        optional_inputs=frozenset({TOKEN_TYPE_IDS}),
        outputs=frozenset({LOGITS}),
        stateful=False,
    ),
}

CacheKind = Literal["shared", "growing"]
"""`shared` (GroupQueryAttention): past and present are one buffer [batch, kv_heads, capacity, head_size], written in
place; row b's tokens lie without gaps in slots 0..length_b-1, and the count of ones in row b of the mask is length_b.
Several new tokens after a past: for a batch of one only. `growing` (plain Attention): present is a new tensor, past
with the new tokens appended. The mask says which slots count, so the runtime aligns rows of unequal length at their
end, and positions come through `position_ids`."""


def past_key(layer: int) -> str:
    return f"{PAST_PREFIX}{layer}.key"


def past_value(layer: int) -> str:
    return f"{PAST_PREFIX}{layer}.value"


def present_key(layer: int) -> str:
    return f"{PRESENT_PREFIX}{layer}.key"


def present_value(layer: int) -> str:
    return f"{PRESENT_PREFIX}{layer}.value"


def present_of(past: str) -> str:
    """The present output that continues a past input: past_key_values.3.key -> present.3.key."""
    return PRESENT_PREFIX + past.removeprefix(PAST_PREFIX)


class GraphConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the runtime must know about a graph beyond the shapes that it reads from it.

    Attributes:
        exporter: Which path made the graph: `mobius`, `mobius-unfused` or `transformers`.
        cache: How key-value state passes between calls, see `CacheKind`.
        layers: Number of past/present pairs.
        vocabulary: Width of the logits, padding included.
        context: Longest sequence, in tokens, that the model was made for.
        dtype: Element type of the logits, and of the cache where that has none of its own.
        member_count: Number of members that the graph computes.
        cache_dtype: Element type of the cache, where it is another: codes whose scales the graph knows.
    """

    exporter: Literal["mobius", "mobius-unfused", "transformers"]
    cache: CacheKind
    layers: int
    vocabulary: int
    context: int
    dtype: Literal["float32", "float16"] = "float32"
    member_count: int = msgspec.field(default=1, name="voices")
    cache_dtype: Literal["int8"] | None = None
