"""Measure how long members take to decode a token on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import EdgemixError
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.evaluation.decode_rate import decoding_rates
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.graphs.providers import choose
from edgemix.runtime.mixing.ensemble import Ensemble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.formats import Target


class StoredGraph(NamedTuple):
    """A graph on disk, with what the runtime must know of it."""

    path: Path
    config: GraphConfig


class DecodingTimes(NamedTuple):
    """Seconds a token.

    Attributes:
        alone: Of each member by itself.
        together: Of their mixture, in which they take turns.
    """

    alone: dict[str, float]
    together: float


def decoding_times(
    graphs: Mapping[str, StoredGraph], prompt: Sequence[int], *, target: Target, progress: Progress = NO_PROGRESS
) -> DecodingTimes:
    """Measure members, interleaved, at batch 1; prefill is not counted. See `runtime.speed`.

    Args:
        graphs: Member name -> its graph.
        prompt: Token ids.
        target: The provider that runs them.
        progress: Progress callback.

    Raises:
        EdgemixError: The provider does not work here, or the members' context is too short to measure in.
    """
    provider = choose(target)
    members = [DecoderGraph.load(graph.path, graph.config, provider, name=name) for name, graph in graphs.items()]
    vocabulary, context = (min(getattr(member, name) for member in members) for name in ("vocabulary", "context"))
    shares = [*np.eye(len(members)), np.full(len(members), 1 / len(members))]
    ensembles = [Ensemble.of(members, each, "linear", vocabulary) for each in shares]
    ids = [token % vocabulary for token in prompt]
    seconds = [1 / rate for rate in decoding_rates(ensembles, ids, context=context, progress=progress)]
    if not np.isfinite(seconds).all():
        raise EdgemixError(f"a context of {context} tokens is too short to measure decoding in")
    return DecodingTimes(dict(zip(graphs, seconds, strict=False)), seconds[-1])
