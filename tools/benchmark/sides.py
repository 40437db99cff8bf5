"""The compared ways to generate: the naive loop, edgemix's techniques, one member, and other runtimes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from peers import PEERS, bare_loop

from edgemix.bundle.paths import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from edgemix.runtime import Mixture
    from edgemix.runtime.mixing.ensemble import Ensemble

NAIVE, ALONE, ALL, STACKED = "naive loop", "one member", "all together", "one graph"
TECHNIQUES: dict[str, dict[str, bool]] = {
    "lazy": {"lazy": True},
    "lookup": {"lookup": True},
    "n-grams": {"ngrams": True},
    "student": {"student": True},
    ALL: {"lazy": True, "lookup": True, "ngrams": True, "student": True},
}


@dataclass
class Side:
    """One way to generate.

    Attributes:
        run: Prompt ids, tokens to generate -> the tokens, step by step.
        like: The side whose texts it must say.
    """

    run: Callable[[list[int], int], Iterable[list[int]]]
    like: str | None = None


def sides(
    bundle: Path,
    mixture: Mixture,
    ensemble: Ensemble,
    peers: Mapping[str, str],
    *,
    stacked: Ensemble | None,
    threads: int,
) -> dict[str, Side]:
    """All that is compared, by name."""
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.decoding.speculative import SpeculativeDecoding
    from edgemix.runtime.decoding.static_batch import StaticBatch
    from edgemix.runtime.mixing.ensemble import Ensemble

    common: dict[str, Any] = {"context": mixture.context, "eos": ()}
    drafters = {"student": mixture.drafting, "ngrams": mixture.ngrams}

    def plainly(ensemble: Ensemble) -> Side:
        def run(ids: list[int], count: int) -> Iterable[list[int]]:
            return _ids(StaticBatch(ensemble, [ids], Sampling(), seeds=[0], max_new_tokens=count, **common))

        return Side(run)

    def fast(techniques: dict[str, bool], ensemble: Ensemble = ensemble, like: str = NAIVE) -> Side:
        own = {name: drafter if techniques.get(name) else None for name, drafter in drafters.items()}
        options: dict[str, Any] = {"lazy": False, "lookup": False, **techniques, **own}

        def run(ids: list[int], count: int) -> Iterable[list[int]]:
            return _ids(
                SpeculativeDecoding(ensemble, ids, Sampling(), seed=0, max_new_tokens=count, **common, **options)
            )

        return Side(run, like)

    best = int(ensemble.weights.argmax())
    one_hot = np.eye(len(ensemble.weights))[best]
    alone = Ensemble.of(ensemble.graphs, one_hot, "linear", mixture.vocabulary)
    found = {NAIVE: plainly(ensemble)}
    for name, techniques in TECHNIQUES.items():
        if name == ALL or all(drafters.get(technique, True) is not None for technique in techniques):
            found[name] = fast(techniques)
    if stacked is not None:
        found[STACKED] = plainly(stacked)
        for name in ("lookup", ALL):
            found[f"{STACKED}, {name}"] = fast(TECHNIQUES[name], stacked, STACKED)
    found[ALONE] = plainly(alone)
    graph = resolve(bundle, mixture.manifest.members[best].graph)
    found["bare ONNX Runtime"] = Side(bare_loop(graph, mixture.vocabulary, threads))
    return found | {name: Side(PEERS[name.partition(" ")[0]](where, threads)) for name, where in peers.items()}


def _ids(decoding: Any) -> Iterable[list[int]]:
    with closing(decoding):
        while tokens := decoding.step():
            yield [token.id for token in tokens]
