"""Compare the mixture of the stored graphs with that of the fp32 graphs: the cost of quantization to the mixture.

Averaging hides part of what the members lose, so their own figures do not tell. A member's fp32 graph is deleted before
the next one is made, and all together may not fit in memory, so only the distributions of each on a short
text are stored: fp16 log-probabilities, 100 MB for 1,024 tokens of 49,152. That rounding changes the figures by about
1e-6 nats, far less than any format.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from edgemix.bundle.manifest import MixtureParity
from edgemix.errors import storage_errors
from edgemix.export.parity.against_fp32 import Distance
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.evaluation.scoring import read
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.mixing.arithmetic import linear, log_softmax

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.runtime import Mixture

MIXTURE_TOKENS = 1_024
"""About how many tokens the mixtures are compared on."""

MIXED_ROWS = 32
"""Tokens that are mixed at once."""


class ObservedTexts:
    """Distributions that an fp32 graph has computed for longer texts, of which `texts` are the beginnings.

    Attributes:
        rows: A text's index -> its log-probabilities, fp16 [tokens - 1, vocabulary].
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._numbers = {np.asarray(text, np.int64).tobytes(): number for number, text in enumerate(texts)}
        self._longest = max(map(len, texts), default=0)
        self.rows: dict[int, NDArray[np.float16]] = {}

    def add(self, text: NDArray[np.int64], start: int, log_probabilities: NDArray[np.float32]) -> None:
        """Add what follows the tokens of a text from `start` on; all its tokens must be added in order."""
        beginning = text[: self._longest]
        number, end = self._numbers.get(beginning.tobytes()), min(start + len(log_probabilities), len(beginning) - 1)
        if number is not None and start < end:
            shape = len(beginning) - 1, log_probabilities.shape[1]
            rows = self.rows.setdefault(number, np.empty(shape, np.float16))
            rows[start:end] = log_probabilities[: end - start]


def keep_distributions(
    path: Path,
    config: GraphConfig,
    texts: Sequence[Sequence[int]],
    output: Path,
    *,
    observed: Mapping[int, NDArray[np.float16]] | None = None,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write an fp32 graph's log-probabilities for texts: fp16 [tokens - 1, vocabulary] each, in nats.

    Args:
        path: The file of the fp32 graph.
        config: The graph's config.
        texts: Token ids, at least two each; tokens beyond the graph's context are left out.
        output: A safetensors file, tensors "0", "1" and so on.
        observed: Those of some texts, by index, from `ObservedTexts`.
        progress: Progress callback.
    """
    kept = {str(number): rows for number, rows in (observed or {}).items()}
    missing = [(number, text) for number, text in enumerate(texts) if str(number) not in kept]
    if missing:
        graph = DecoderGraph.load(path, msgspec.structs.replace(config, dtype="float32"))
        with progress.stage("fp32 distributions", sum(len(text) - 1 for _, text in missing)) as task:
            for number, text in missing:
                ids = np.asarray(text[: graph.context], np.int64)
                rows = np.empty((len(ids) - 1, graph.vocabulary), np.float16)
                with closing(read([graph], ids, vocabulary=graph.vocabulary, window=len(ids))) as pieces:
                    for place, (logits,), targets in pieces:
                        rows[place] = log_softmax(logits)
                        task.advance(len(targets))
                kept[str(number)] = rows
    with storage_errors(f"writing {output}"):
        save_file(kept, output)


def compare_mixtures(
    mixture: Mixture, kept: Mapping[str, Path], texts: Sequence[Sequence[int]], *, progress: Progress = NO_PROGRESS
) -> MixtureParity:
    """Compare a mixture, with its own weights, with that of its members' fp32 graphs.

    Args:
        mixture: The mixture of the stored graphs.
        kept: Member name -> the file that `keep_distributions` wrote; members stored in fp32 need none.
        texts: The texts that `keep_distributions` got.
        progress: Progress callback.
    """
    ensemble, distance = mixture.ensemble(dict.fromkeys(mixture.members, 1.0)), Distance()
    weights = np.array([mixture.weights[name] for name in mixture.members])
    with ExitStack() as stack, progress.stage("mixture parity", sum(len(text) - 1 for text in texts)) as task:
        files = [stack.enter_context(safe_open(kept[name], "np")) if name in kept else None for name in mixture.members]
        for number, text in enumerate(texts):
            ids = np.asarray(text[: mixture.context], np.int64)
            exact = [file and file.get_slice(str(number)) for file in files]
            with closing(read(ensemble.graphs, ids, vocabulary=ensemble.vocabulary, window=len(ids))) as pieces:
                for place, logits, targets in pieces:
                    for start in range(0, len(targets), MIXED_ROWS):
                        rows = slice(start, min(start + MIXED_ROWS, len(targets)))
                        p, q = _mixed(weights, exact, logits, place.start, rows)
                        distance.add(p, q, targets[rows])
                    task.advance(len(targets))
    return MixtureParity(
        weights=dict(mixture.weights),
        tokens=distance.tokens,
        kl=distance.kl,
        top1_disagreement=distance.top1_disagreement,
        perplexity_ratio=distance.perplexity_ratio,
    )


def _mixed(
    weights: NDArray[np.float64],
    exact: Sequence[Any],
    logits: Sequence[NDArray[np.float32]],
    start: int,
    rows: slice,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return both mixtures' log-probabilities [rows, vocabulary]; `exact` has quantized members' stored tensors."""
    active = np.flatnonzero(weights).tolist()
    stored = np.stack([log_softmax(logits[model][rows]) for model in active])
    fp32 = stored.copy()
    for place, model in enumerate(active):
        if (tensor := exact[model]) is not None:
            kept = tensor[start + rows.start : start + rows.stop, : stored.shape[-1]]
            fp32[place] = log_softmax(kept.astype(np.float32))
    return linear(fp32, weights[active]), linear(stored, weights[active])
