"""The only table of tolerances: how far a graph may be from its source, and the error for one that is further."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemix.bundle.manifest import GraphParity, PruningFigures, QuantizationParity
from edgemix.errors import ParityError

if TYPE_CHECKING:
    from edgemix.formats import Format


@dataclass(frozen=True)
class Limits:
    """How far a format may go from fp32: mean KL divergence (nats a token), top-1 disagreement, perplexity ratio."""

    kl: float
    top1_disagreement: float
    perplexity_ratio: float


LIMITS: dict[Format, Limits] = {
    "fp32": Limits(kl=1e-6, top1_disagreement=0.001, perplexity_ratio=1.001),
    "fp16": Limits(kl=1e-3, top1_disagreement=0.01, perplexity_ratio=1.01),
    "int8": Limits(kl=0.02, top1_disagreement=0.05, perplexity_ratio=1.03),
    "int8-dynamic": Limits(kl=0.05, top1_disagreement=0.1, perplexity_ratio=1.05),
    "int4": Limits(kl=0.45, top1_disagreement=0.35, perplexity_ratio=1.5),
    "nf4": Limits(kl=0.45, top1_disagreement=0.35, perplexity_ratio=1.5),
}
"""Set by SmolLM2-135M: small, and so hard to quantise. Worst of WikiText-2 and Python it has: int8 0.004, 0.015, 1.01;
int4 0.29, 0.26, 1.27, nf4 a bit less; int8-dynamic 1.01 with its outliers treated, and otherwise, which must not pass,
0.28, 0.23, 1.25. Text that the graph writes itself gives figures about a third higher: the rest of the
room is for that."""


@dataclass(frozen=True)
class PruningLimits:
    """How far a pruned model may go from the whole one: mean KL divergence (nats a token), perplexity ratio."""

    kl: float
    perplexity_ratio: float


PRUNING_LIMITS = PruningLimits(kl=0.5, perplexity_ratio=1.5)

GRAPH_TOLERANCE = 1e-4
"""Largest difference of log-probabilities (nats) between torch and a graph, where the torch model itself is stable."""

NOISE = 1e-6
"""Relative change of the embeddings, about what rounding adds up to in a deep model, that shows where it is not."""

NOISE_ROOM = 5
"""How many times the change that `NOISE` makes a position may differ. Of SmolLM2-135M's graphs no position differs by
more than 2.1 times; single positions, with huge activations in them, by up to 4e-3 nats, most by 4e-5."""

CHECKED_WINDOW = 1024
"""Sliding windows up to this length are crossed by `check_graph`'s sequence; longer ones would take it minutes."""

FLIP_MARGIN = 0.1
"""A near tie decided the other way is no flip: the fp32 graph must prefer its token by more than this, in nats."""


def enforce(
    figures: GraphParity | QuantizationParity | PruningFigures, *, forced: bool = False, member: str = ""
) -> bool:
    """Stop where figures are over their limits.

    Args:
        figures: As measured.
        forced: The user wants the graph whatever its figures are.
        member: The member's name, for the message.

    Returns:
        True if figures are over a limit and `forced` let them pass.

    Raises:
        ParityError: Figures are over a limit and not `forced`, or no numbers at all.
    """
    if isinstance(figures, GraphParity):
        limits = dict.fromkeys(("prefill", "decode", "padded_batch"), figures.limit)
        what, remedy = "differs from the torch model in log-probabilities", "Keep it as it is with --force."
    elif isinstance(figures, PruningFigures):
        limits = {name: getattr(figures, f"{name}_limit") for name in ("kl", "perplexity_ratio")}
        what = f"is too far from the model before pruning on {figures.tokens} tokens"
        remedy = "Prune less, let it recover longer (recover: MINUTES), or keep it as it is with --force."
    else:
        limits = {name: getattr(figures, f"{name}_limit") for name in ("kl", "top1_disagreement", "perplexity_ratio")}
        if figures.decode_kl is not None:
            limits["decode_kl"] = figures.kl_limit
        what = f"is too far from the fp32 graph on {figures.tokens} tokens"
        remedy = "Choose a format with more bits for it, or keep it as it is with --force."
    values = {name: getattr(figures, name) for name in limits}
    if all(values[name] <= limits[name] for name in limits):
        return False
    if forced and all(map(math.isfinite, values.values())):
        return True
    table = ", ".join(f"{name.replace('_', ' ')} {values[name]:.2g} (limit {limits[name]:.2g})" for name in limits)
    raise ParityError(f"the graph {f'of member {member!r} ' if member else ''}{what}: {table}", remedy)


def within(figures: GraphParity | QuantizationParity | PruningFigures) -> bool:
    """Whether figures are within their limits."""
    try:
        return not enforce(figures)
    except ParityError:
        return False
