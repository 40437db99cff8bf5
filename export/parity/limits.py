"""Tolerances: how far a graph may be from its source, and the error for one that is further.

Those of quantized graphs are in `edgemix.formats`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgemix.bundle.manifest import GraphParity, PruningFigures, QuantizationParity
from edgemix.errors import ParityError


@dataclass(frozen=True)
class PruningLimits:
    """Limits of a pruned model's distance from the original: mean KL divergence (nats a token), perplexity ratio."""

    kl: float
    perplexity_ratio: float


PRUNING_LIMITS = PruningLimits(kl=0.5, perplexity_ratio=1.5)

GRAPH_TOLERANCE = 1e-4
"""Largest difference of log-probabilities (nats) between torch and a graph, where the torch model itself is stable."""

NOISE = 1e-6
"""Relative change of the embeddings, about the size of rounding in a deep model, that shows where it is unstable."""

NOISE_ROOM = 5
"""Largest difference at a position, in units of the change by `NOISE`. In SmolLM2-135M's graphs none exceeds 2.1;
single positions with huge activations differ by up to 4e-3 nats, most by 4e-5."""

CHECKED_WINDOW = 1024
"""Sliding windows up to this length are crossed by `check_graph`'s sequence; longer ones would take it minutes."""

TOP1_MARGIN = 0.1
"""Margin in nats by which the fp32 graph must prefer its own token for a disagreement to count."""


def enforce(
    figures: GraphParity | QuantizationParity | PruningFigures, *, forced: bool = False, member: str = ""
) -> bool:
    """Raise an error if figures are over their limits.

    Args:
        figures: The measured figures.
        forced: Accept finite figures over their limits.
        member: The member's name, for the message.

    Returns:
        True if figures are over a limit and were accepted.

    Raises:
        ParityError: Figures are over a limit and not `forced`, or not finite.
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
    """Return whether figures are within their limits."""
    try:
        return not enforce(figures)
    except ParityError:
        return False
