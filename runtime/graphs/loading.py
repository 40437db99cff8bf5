"""Load the graphs of a bundle side by side."""

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
from edgemix.runtime.processor import default_threads

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.runtime.graphs.providers import Provider


def open_graphs(
    bundle: Path, manifest: Manifest, provider: Provider, threads: int | None, *, student: bool, packed: Path | None
) -> tuple[list[DecoderGraph], DecoderGraph | None]:
    """Load every graph of the members, in their order, and the graph that the student drafts with.

    Args:
        bundle: The folder.
        manifest: The bundle's, or the one that is being made.
        provider: Where the graphs run.
        threads: Threads within an operator; physical cores by default.
        student: Load the student, too, if there is one: its draft graph of the most frequent tokens where it has that.
        packed: Where weights are kept in the layout of the provider's kernels.

    Raises:
        BundleError: A graph does not load.
    """
    # Several members may share a graph.
    entries = [next(entries) for _, entries in groupby(manifest.members, key=lambda entry: entry.graph)]
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
