"""How fast text is decoded here and now: a short measurement that an evaluation can afford."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import closing
from typing import TYPE_CHECKING

from edgemix.progress import NO_PROGRESS
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.static_batch import StaticBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.progress import Progress
    from edgemix.runtime.mixing.ensemble import Ensemble

PROMPT, STEPS, ROUNDS = 64, 24, 3
"""Most tokens of the prompt, tokens decoded after the first, and how often each ensemble has its turn."""


def decoding_rates(
    ensembles: Sequence[Ensemble], prompt: Sequence[int], *, context: int, progress: Progress = NO_PROGRESS
) -> list[float]:
    """Tokens a second of greedy decoding at batch 1, prefill not counted, for each ensemble.

    The ensembles take turns, so that a machine that slows down does so for all, and the first turn is a warm-up. What
    counts is the median over the tokens of the others: another process that takes a core for a moment does not matter.

    Args:
        ensembles: Who decodes.
        prompt: Token ids that all continue, at least one; its first `PROMPT` are taken.
        context: Most tokens of a sequence. One that leaves no room to decode gives NaN.
        progress: Hears of the turns.
    """
    start = prompt[: max(1, min(PROMPT, context - STEPS))]
    seconds: list[list[float]] = [[] for _ in ensembles]
    with progress.stage("speed", (ROUNDS + 1) * len(ensembles)) as task:
        for turn in range(ROUNDS + 1):
            for ensemble, found in zip(ensembles, seconds, strict=True):
                timed = _decode(ensemble, start, context)
                found.extend(timed if turn > 0 else [])
                task.advance()
    return [1 / statistics.median(found) if found else math.nan for found in seconds]


def _decode(ensemble: Ensemble, prompt: Sequence[int], context: int) -> list[float]:
    """Seconds that each token took, after the first."""
    decoding = StaticBatch(
        ensemble, [prompt], Sampling(), seeds=[0], max_new_tokens=STEPS + 1, context=context, eos=()
    )  # without an end of text, every turn is as long
    seconds = []
    with closing(decoding):
        decoding.step()
        begun = time.perf_counter()
        while decoding.step():
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    return seconds
