"""A bundle's graphs, opened side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgemix.bundle.paths import resolve
from edgemix.bundle.reader import draft_tokens, graph_digest
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.graphs.prepacked_weights import PrepackedWeights
from edgemix.runtime.graphs.providers import default_threads

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.runtime.graphs.providers import Provider


def open_graphs(
    bundle: Path, manifest: Manifest, provider: Provider, threads: int | None, *, student: bool, packed: Path | None
) -> tuple[list[DecoderGraph], DecoderGraph | None]:
    """Every graph of the members, in their order, and what the student drafts with.

    Args:
        bundle: The folder.
        manifest: Its own, or what there is of it while it is being made.
        provider: Where they run.
        threads: Threads within an operator; physical cores by default.
        student: Open the student, too, if there is one: the graph that has some tokens only, where it has that.
        packed: Where weights are kept as the provider's kernels want them.

    Raises:
        BundleError: A graph does not load.
    """
    # Several members may share a graph, as its voices.
    entries = [next(voices) for _, voices in groupby(manifest.members, key=lambda entry: entry.graph)]
    drafter = manifest.student if student else None
    kept = PrepackedWeights.of_this_machine(packed) if packed else None

    def open_one(entry: MemberEntry) -> DecoderGraph:
        path, config, tokens = entry.graph, entry.config, None
        if entry is drafter and entry.draft is not None:
            path, config = entry.draft.graph, msgspec.structs.replace(config, vocabulary=entry.draft.vocabulary)
            tokens = np.array(draft_tokens(bundle, manifest, entry.draft), np.int64)
        place = (kept, graph_digest(manifest, path)) if kept else None
        graph = resolve(bundle, path)
        return DecoderGraph.load(graph, config, provider, threads, name=entry.name, packed=place, tokens=tokens)

    with ThreadPoolExecutor(default_threads()) as workers:
        opened = list(workers.map(open_one, [*entries, *([drafter] if drafter else [])]))
    return (opened[:-1], opened[-1]) if drafter else (opened, None)
