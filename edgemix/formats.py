"""The weight formats: what a recipe may ask for and a manifest may hold. One row a format.

A new format is a new row here, and the function in `edgemix.export.quantization.formats` that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["fp32", "fp16", "int8", "int8-dynamic", "int4", "nf4"]
Target = Literal["cpu", "cuda"]

TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a format may be from fp32.

    Attributes:
        kl: Mean KL divergence, in nats a prediction.
        top1_disagreement: Share of predictions whose most probable token or label differs.
        perplexity_ratio: Ratio of perplexities.
        metric_drop: Loss of a label task's own metric (accuracy, entity F1).
    """

    kl: float
    top1_disagreement: float
    perplexity_ratio: float
    metric_drop: float


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """A weight format.

    Attributes:
        name: As in recipes and manifests.
        bits: Bits of a stored weight, without scales.
        limits: The parity gate's.
        targets: Where it runs.
        calibration: Whether its quantization reads calibration text.
        block_bits: Bits of its blocks, which can be computed beforehand or taken from a GGUF file; None without blocks.
        mixed_bits: Whether its most sensitive layers may have 8 bits, and an algorithm chooses its blocks.
        rotatable: Whether rotating the model first reduces its error.
        integer_products: Whether the CPU computes its products in 8 bits.
        faithful: Whether its distributions are those of the torch model, up to bfloat16's rounding.
        shared_base: Whether members of one base can share a graph in it.
        candidate: Whether a budget may choose it.
        cpu_cost: Cost of a layer's weight when a CPU decodes a token, as bytes that could be read meanwhile: fp16
            is computed in fp32, and unpacking nf4 takes as long as that.
        gpu_cost: The same on a GPU.
        stored_bytes: Bytes of a layer's weight on disk, with scales; None where they depend on the block size.
    """

    name: Format
    bits: int
    limits: Limits
    cpu_cost: float
    gpu_cost: float
    stored_bytes: float | None = None
    targets: tuple[Target, ...] = TARGETS
    calibration: Literal["none", "optional", "required"] = "none"
    block_bits: Literal[4, 8] | None = None
    mixed_bits: bool = False
    rotatable: bool = False
    integer_products: bool = False
    faithful: bool = False
    shared_base: bool = True
    candidate: bool = False

    @property
    def reference(self) -> bool:
        """Whether it is what a graph is exported in, and the others are compared with."""
        return self.bits == 32

    def compute_dtype(self, target: Target) -> Literal["float32", "float16"]:
        """Return the type of activations and logits."""
        return "float16" if target == "cuda" and not self.reference else "float32"

    @property
    def floating_point(self) -> bool:
        """Whether weights stay floating-point numbers."""
        return self.bits >= 16


# The limits were set with SmolLM2-135M: small, and so hard to quantize. Its worst figures on WikiText-2 and Python are
# for int8 0.004, 0.015, 1.01; for int4 0.29, 0.26, 1.27, for nf4 a bit less; for int8-dynamic 1.01 with its outliers
# treated, and otherwise, which must not pass, 0.28, 0.23, 1.25. Text that the graph generates itself gives figures
# about a third higher: the rest of the room is for that.
_ROWS = (
    FormatSpec(
        "fp32", 32, Limits(1e-6, 0.001, 1.001, 0.001), cpu_cost=4.0, gpu_cost=4.0, stored_bytes=4.0, faithful=True
    ),
    FormatSpec(
        "fp16",
        16,
        Limits(1e-3, 0.01, 1.01, 0.002),
        cpu_cost=4.0,
        gpu_cost=2.0,
        stored_bytes=2.0,
        faithful=True,
        candidate=True,
    ),
    FormatSpec(
        "int8",
        8,
        Limits(0.02, 0.05, 1.03, 0.01),
        cpu_cost=1.06,
        gpu_cost=1.06,
        calibration="optional",
        block_bits=8,
        integer_products=True,
        faithful=True,
        candidate=True,
    ),
    FormatSpec(
        "int8-dynamic",
        8,
        Limits(0.05, 0.1, 1.05, 0.01),
        cpu_cost=1.03,
        gpu_cost=1.03,
        stored_bytes=1.02,  # with one scale per row
        targets=("cpu",),
        calibration="required",
        rotatable=True,
        integer_products=True,
        faithful=True,
    ),
    FormatSpec(
        "int4",
        4,
        Limits(0.45, 0.35, 1.5, 0.03),
        cpu_cost=0.56,
        gpu_cost=0.56,
        calibration="optional",
        block_bits=4,
        mixed_bits=True,
        rotatable=True,
        integer_products=True,
        candidate=True,
    ),
    FormatSpec(
        "nf4", 4, Limits(0.45, 0.35, 1.5, 0.03), cpu_cost=4.0, gpu_cost=0.53, stored_bytes=0.5625, shared_base=False
    ),
)

FORMAT_SPECS: dict[Format, FormatSpec] = {row.name: row for row in _ROWS}
FORMATS: tuple[Format, ...] = tuple(FORMAT_SPECS)
BLOCK_FORMATS: dict[int, Format] = {row.block_bits: row.name for row in _ROWS if row.block_bits}
"""The formats of blocks, by their bits."""
MIXED_BITS: Format = next(row.name for row in _ROWS if row.mixed_bits)
HEAD_FORMAT: Format = BLOCK_FORMATS[8]
"""The format of embedding and head in quantized graphs, or one as fast."""


def candidate_formats(target: Target) -> tuple[Format, ...]:
    """Return the formats that a budget may choose for a target, those of the fewest bits first."""
    rows = sorted(FORMAT_SPECS.values(), key=lambda row: row.bits)
    return tuple(row.name for row in rows if row.candidate and target in row.targets)
