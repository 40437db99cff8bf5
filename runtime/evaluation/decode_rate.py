"""Short measurements of the decoding rate on this machine."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import closing
from typing import TYPE_CHECKING

from edgemix.progress import NO_PROGRESS
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.speculative import SpeculativeDecoding
from edgemix.runtime.decoding.static_batch import StaticBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.progress import Progress
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.mixture import Mixture

PROMPT, STEPS, ROUNDS = 64, 24, 3
"""Maximum tokens of the prompt, tokens decoded after the first, and turns of each ensemble after a warm-up."""
PROMPTS, GENERATED, REPEATS = 3, 32, 2
"""For `generation_rate`: maximum number of prompts, tokens after the first of each, and rounds after a warm-up."""


def decoding_rates(
    ensembles: Sequence[Ensemble], prompt: Sequence[int], *, context: int, progress: Progress = NO_PROGRESS
) -> list[float]:
    """Return each ensemble's tokens per second of greedy decoding in the plain loop at batch size 1, without prefill.

    The ensembles take turns, so that a machine that slows down does so for all, and the first turn is a warm-up. The
    result is the median over the tokens of the other turns: a short disturbance by another process does not matter.

    Args:
        ensembles: The ensembles to measure.
        prompt: Token ids to continue, at least one; the first `PROMPT` are used.
        context: Maximum tokens of a sequence. One that leaves no room to decode gives NaN.
        progress: Progress callback; counts turns.
    """
    start = prompt[: max(1, min(PROMPT, context - STEPS))]
    seconds: list[list[float]] = [[] for _ in ensembles]
    with progress.stage("speed", (ROUNDS + 1) * len(ensembles)) as task:
        for turn in range(ROUNDS + 1):
            for ensemble, found in zip(ensembles, seconds, strict=True):
                timed = decode_times(ensemble, start, context)
                found.extend(timed if turn > 0 else [])
                task.advance()
    return [1 / statistics.median(found) if found else math.nan for found in seconds]


def generation_rate(mixture: Mixture, prompts: Sequence[Sequence[int]], progress: Progress = NO_PROGRESS) -> float:
    """Return tokens per second of greedy decoding as `Mixture.generate` does it by default, without prefill.

    Args:
        mixture: The loaded bundle, with its default weights, drafts and plan.
        prompts: Token ids to continue, at least one each; `PROMPTS` of them are used, and `PROMPT` tokens of each.
        progress: Progress callback; counts texts.

    Returns:
        The median over rounds of all prompts; NaN where the context leaves no room to decode.
    """
    room = max(1, min(PROMPT, mixture.context - GENERATED))
    starts, rates = [prompt[:room] for prompt in prompts[:PROMPTS]], []
    with progress.stage("speed as generated", 1 + REPEATS * len(starts)) as task:
        _generate(mixture, starts[0])
        task.advance()
        for _ in range(REPEATS):
            tokens, seconds = 0, 0.0
            for start in starts:
                found = _generate(mixture, start)
                tokens, seconds = tokens + found[0], seconds + found[1]
                task.advance()
            rates.append(tokens / seconds if tokens else math.nan)
    return statistics.median(rates)


def _generate(mixture: Mixture, prompt: Sequence[int]) -> tuple[int, float]:
    """Return the number of tokens generated after the first step, and their seconds."""
    speculation = "auto" if mixture.plan is None else mixture.plan.speculation
    if speculation == "off":
        seconds = decode_times(mixture.ensemble(), prompt, mixture.context)
        return len(seconds), sum(seconds)
    lookup, drafts = speculation in ("auto", "lookup"), speculation in ("auto", "student")
    decoding = SpeculativeDecoding(
        mixture.ensemble(),
        prompt,
        Sampling(),
        seed=None,
        max_new_tokens=GENERATED + 1,
        context=mixture.context,
        eos=(),
        student=mixture.drafting if drafts else None,
        lookup=lookup,
        ngrams=mixture.ngrams if lookup else None,
    )
    with closing(decoding):
        decoding.step()
        tokens, begun = 0, time.perf_counter()
        while step := decoding.step():
            tokens += len(step)
        return tokens, time.perf_counter() - begun


def decode_times(ensemble: Ensemble, prompt: Sequence[int], context: int) -> list[float]:
    """Return the seconds of each token after the first."""
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
