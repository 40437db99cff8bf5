"""The measurements of every target, and their results."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemix.results.profile import Batch, Decode, Energy, Prefill, SpeculationResult, TargetResult
from edgemix.runtime.profiling.targets import FAST, PLAIN
from edgemix.runtime.profiling.timing import Measurement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemix.results.profile import Quantiles
    from edgemix.runtime.profiling.energy import Meter
    from edgemix.runtime.profiling.prompts import Prompts
    from edgemix.runtime.profiling.targets import Run, Target


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        contexts: Prompt lengths behind which tokens are decoded, the shortest first.
        prompts: Further lengths, of prompts that are only read.
        batches: Batch sizes; measured for the mixture alone, unless `all_targets`.
        tokens: Tokens decoded in a run.
        texts: Number of prompts on which speculative decoding is compared with the plain loop.
        all_targets: Measure members and the student at all sizes, too.
        patience: Seconds after which a run ends early.
    """

    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int
    texts: int
    all_targets: bool
    patience: float

    def within(self, context: int) -> Sizes:
        """Return the sizes that fit into a context, each cut to it."""
        room = max(1, context - self.tokens)
        cut = sorted({min(size, room) for size in self.contexts})
        prompts = tuple(sorted({min(size, context) for size in self.prompts} - set(cut)))
        return Sizes(
            tuple(cut),
            prompts,
            self.batches,
            self.tokens,
            self.texts,
            all_targets=self.all_targets,
            patience=self.patience,
        )


@dataclass
class TargetSamples:
    """Samples of one target beside its series.

    Attributes:
        runs: Pairs of a plain and a speculative run on the same prompt.
        joules: Energy per token by counter, one value per run.
    """

    runs: list[tuple[Run, Run]] = field(default_factory=list)
    joules: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Bench:
    """All measurements of a list of targets.

    Args:
        targets: What is measured; the mixture with speculative decoding last.
        prompts: Prompts to continue.
        sizes: Prompt, context and batch sizes.
        meter: Energy meter.
    """

    def __init__(self, targets: Sequence[Target], prompts: Prompts, sizes: Sizes, meter: Meter) -> None:
        self.targets = {target.name: target for target in targets}
        self._fast = self.targets[FAST]
        self._plain = self.targets.get(PLAIN) or targets[0]
        self.prompts, self.meter = prompts, meter
        self.sizes = sizes.within(self._fast.context)
        self._samples: dict[str, TargetSamples] = defaultdict(TargetSamples)
        self._found: dict[tuple[str, str, int], Measurement] = {}
        self.measurements = [*self._plan()]

    def warm_up(self) -> None:
        """Run every graph once, so that memory allocation is not measured."""
        for target in self.targets.values():
            self._run(target, 1, 0, tokens=1)

    def result(self, name: str) -> TargetResult:
        """Return a target's result; what was not measured is missing in it."""
        target, samples, sizes = self.targets[name], self._samples[name], self.sizes
        ttft = [(size, self._figure(name, "ttft", size)) for size in sorted({*sizes.prompts, *sizes.contexts})]
        tpot = [(size, self._figure(name, "tpot", size)) for size in sizes.contexts]
        rates = [(size, self._figure(name, "rate", size)) for size in sizes.batches]
        return TargetResult(
            name=name,
            kind=target.kind,
            format=target.format,
            files=target.files,
            prefill=tuple(Prefill(size, found) for size, found in ttft if found),
            decode=tuple(Decode(size, found) for size, found in tpot if found),
            batches=tuple(Batch(size, found) for size, found in rates if found),
            speculation=speculation(samples.runs) if samples.runs else None,
            energy=_energy(samples.joules),
        )

    def missing(self) -> list[str]:
        """Return the names of measurements for which there was no time."""
        return [each.name for each in self.measurements if not each.turns]

    def unstable(self) -> list[str]:
        """Return the names of measurements that are not stable."""
        return [each.name for each in self.measurements if each.turns and not each.stable]

    def _plan(self) -> Iterator[Measurement]:
        """Yield the measurements, the most important ones first."""
        sizes, others = self.sizes, [c for c in self.targets.values() if c.name not in (FAST, PLAIN)]
        yield self._pairs()
        for target in others:
            yield self._decode(target, sizes.contexts[0])
        both = [c for c in self.targets.values() if c.name in (FAST, PLAIN)]
        for size in sizes.prompts:
            chosen = [*both, *others] if sizes.all_targets else both
            yield from (self._prefill(target, size) for target in chosen)
        for size in sizes.batches:
            chosen = [self._plain, *(c for c in others if sizes.all_targets and c is not self._plain)]
            yield from (self._batch(target, size) for target in chosen)
        for size in sizes.contexts[1:]:
            yield from (self._decode(target, size) for target in [*both, *others])

    def _pairs(self) -> Measurement:
        """Measure the plain loop and speculative decoding in turns, on the same prompts in every round."""
        size = self.sizes.contexts[0]

        def take(_: int) -> Mapping[str, Sequence[float]]:
            found: dict[str, list[float]] = defaultdict(list)
            for number in range(self.sizes.texts):
                pair = [self._run(target, size, number) for target in (self._plain, self._fast)]
                self._samples[FAST].runs.append((pair[0], pair[1]))
                for target, run in zip((self._plain, self._fast), pair, strict=True):
                    found[f"{target.name} ttft"].append(run.ttft)
                    found[f"{target.name} tpot"] += run.tpot
            return found

        measurement = Measurement(f"{FAST}, {size} tokens of context", take)
        for name in {self._fast.name, *({PLAIN} & self.targets.keys())}:
            self._found[name, "ttft", size] = self._found[name, "tpot", size] = measurement
        return measurement

    def _decode(self, target: Target, size: int) -> Measurement:
        def take(number: int) -> Mapping[str, Sequence[float]]:
            run = self._run(target, size, number if target.plain else 0)
            return {f"{target.name} ttft": [run.ttft], f"{target.name} tpot": run.tpot}

        measurement = Measurement(f"{target.name}, {size} tokens of context", take)
        self._found[target.name, "ttft", size] = self._found[target.name, "tpot", size] = measurement
        return measurement

    def _prefill(self, target: Target, size: int) -> Measurement:
        def take(number: int) -> Mapping[str, Sequence[float]]:
            # Which members are evaluated depends on the text: every round has the same texts.
            texts = [number] if target.plain else range(self.sizes.texts)
            return {f"{target.name} ttft": [self._run(target, size, text, tokens=0).ttft for text in texts]}

        measurement = Measurement(f"{target.name}, a prompt of {size} tokens", take)
        self._found[target.name, "ttft", size] = measurement
        return measurement

    def _batch(self, target: Target, size: int) -> Measurement:
        def take(_: int) -> Mapping[str, Sequence[float]]:
            prompts = self.prompts.batch(self.sizes.contexts[0], size)
            run = target.run(prompts, self.sizes.tokens // 2, meter=self.meter, patience=self.sizes.patience)
            return {f"{target.name} rate": [size / seconds for seconds in run.tpot]}

        measurement = Measurement(f"{target.name}, {size} texts at once", take)
        self._found[target.name, "rate", size] = measurement
        return measurement

    def _run(self, target: Target, size: int, number: int, *, tokens: int | None = None) -> Run:
        prompt = self.prompts.take(size, number)
        new = self.sizes.tokens if tokens is None else tokens
        run = target.run([prompt], new, meter=self.meter, patience=self.sizes.patience)
        if tokens is None and run.tokens:
            for counter, joules in run.joules.items():
                self._samples[target.name].joules[counter].append(joules / run.tokens)
        return run

    def _figure(self, name: str, figure: str, size: int) -> Quantiles | None:
        measurement = self._found.get((name, figure, size))
        return measurement.figure(f"{name} {figure}") if measurement else None


def speculation(runs: Sequence[tuple[Run, Run]]) -> SpeculationResult:
    """Summarize speculative decoding from pairs of a plain and a speculative run."""
    fast = [run for _, run in runs]
    drafted, tokens = sum(run.drafted for run in fast), sum(run.tokens for run in fast)
    ratios = [
        (plain.seconds / plain.tokens) / (run.seconds / run.tokens)
        for plain, run in runs
        if plain.tokens and run.tokens and run.seconds
    ]
    return SpeculationResult(
        acceptance=sum(run.accepted for run in fast) / drafted if drafted else None,
        drafted=drafted / tokens if tokens else 0.0,
        calls=sum(run.calls for run in fast) / tokens if tokens else 0.0,
        speedup=statistics.median(ratios) if ratios else 1.0,
    )


def _energy(joules: Mapping[str, Sequence[float]]) -> Energy | None:
    """Return the energy by the counter that counted most: the CPU package, or the GPU."""
    medians = {counter: statistics.median(found) for counter, found in joules.items()}
    counter = max(medians, key=lambda name: medians[name], default=None)
    return None if counter is None else Energy(counter, medians[counter])
