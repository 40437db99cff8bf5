"""Time the sides in turns, and whole batches."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sides import Side

    from edgemix.cli.console import Console
    from edgemix.runtime import Mixture
    from edgemix.runtime.mixing.ensemble import Ensemble


@dataclass
class Turns:
    """What a side did: by prompt, a figure a round."""

    prefill: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, list[int]] = field(default_factory=dict)


def take_turns(
    compared: Mapping[str, Side], prompts: list[list[int]], *, new: int, rounds: int, console: Console
) -> dict[str, Turns]:
    """Let every side generate from every prompt, in turns."""
    found = {name: Turns() for name in compared}
    with console.progress.stage("turns", (rounds + 1) * len(prompts) * len(compared)) as task:
        for turn in range(rounds + 1):
            for number, prompt in enumerate(prompts):
                for name, side in compared.items():
                    begun = time.perf_counter()
                    steps = iter(side.run(prompt, new))
                    text = list(next(steps))
                    first, before = time.perf_counter(), len(text)
                    for step in steps:
                        text += step
                    seconds = time.perf_counter() - first
                    found[name].text[number] = text
                    if turn:
                        found[name].prefill[number].append(len(prompt) / (first - begun))
                        found[name].decode[number].append((len(text) - before) / seconds)
                    task.advance(note=name)
    return found


def throughput(
    mixture: Mixture, ensemble: Ensemble, prompts: list[list[int]], *, size: int, new: int
) -> dict[str, Any]:
    """Tokens a second of all texts together, prompts and all: one text alone by the plain loop, a batch, and three
    times as many texts that join and leave a batch of that size, a quarter to seven quarters as long. Medians of turns.
    """
    from edgemix.runtime.decoding.batch import ContinuousBatch
    from edgemix.runtime.decoding.request import GenerationRequest
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.decoding.static_batch import StaticBatch
    from edgemix.runtime.mixing.ensemble import Ensemble

    some = [prompts[i % len(prompts)] for i in range(3 * size)]

    def batch(ids: list[list[int]]) -> tuple[float, float]:
        options: dict[str, Any] = {"seeds": [0] * len(ids), "context": mixture.context, "eos": ()}
        begun = time.perf_counter()
        with closing(StaticBatch(ensemble, ids, Sampling(), max_new_tokens=new, **options)) as decoding:
            decoding.step()
            first = time.perf_counter()
            while decoding.step():
                pass
        ended = time.perf_counter()
        return len(ids) * new / (ended - begun), len(ids) * (new - 1) / (ended - first)

    def continuous() -> float:
        lengths = np.linspace(new / 4, 7 * new / 4, len(some)).astype(int)
        np.random.default_rng(0).shuffle(lengths)
        everyone = Ensemble(
            ensemble.graphs, np.full(len(ensemble.weights), 1 / len(ensemble.weights)), "linear", ensemble.vocabulary
        )
        begun, tokens = time.perf_counter(), 0
        with closing(ContinuousBatch(everyone, size)) as served:
            for ids, length in zip(some, lengths, strict=True):
                served.add(
                    GenerationRequest.of(
                        ensemble,
                        np.arange(len(ensemble.weights)),
                        ids,
                        Sampling(),
                        seed=0,
                        max_new_tokens=int(length),
                        context=mixture.context,
                        eos=(),
                    )
                )
            while len(served):
                tokens += len(served.step())
        return tokens / (time.perf_counter() - begun)

    batch(some[:1])
    turns = [(batch(some[:1]), batch(some[:size]), continuous()) for _ in range(3)]
    return {
        "batch": size,
        "alone": statistics.median(alone for (alone, _), *_ in turns),
        "together": statistics.median(together for _, (together, _), _ in turns),
        "continuous": statistics.median(coming for *_, coming in turns),
        "decode_times_alone": statistics.median(together / alone for (_, alone), (_, together), _ in turns),
        "continuous_share": statistics.median(coming / together for _, (together, _), coming in turns),
    }
