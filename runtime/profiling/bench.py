"""The measurements of every contender, and what the profile says of it."""

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
    from edgemix.runtime.profiling.targets import Contender, Run


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        contexts: Prompt lengths behind which tokens are decoded, the shortest first.
        prompts: Further lengths, of prompts that are only read.
        batches: Texts at once; of the mixture alone, unless `everybody`.
        tokens: Decoded in a run.
        texts: Different prompts on which the mixture in fewer calls is compared with the plain one.
        everybody: Whether members and student are measured at all sizes, too.
        patience: Seconds after which a run ends early.
    """

    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int
    texts: int
    everybody: bool
    patience: float

    def within(self, context: int) -> Sizes:
        """Those that fit into a context, each cut to it."""
        room = max(1, context - self.tokens)
        cut = sorted({min(size, room) for size in self.contexts})
        prompts = tuple(sorted({min(size, context) for size in self.prompts} - set(cut)))
        return Sizes(
            tuple(cut), prompts, self.batches, self.tokens, self.texts, everybody=self.everybody, patience=self.patience
        )


@dataclass
class Gathered:
    """What is known of one contender beyond its series.

    Attributes:
        runs: Pairs of a plain run and one in fewer calls, on the same prompt.
        joules: By counter, of a token, a run each.
    """

    runs: list[tuple[Run, Run]] = field(default_factory=list)
    joules: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Bench:
    """All measurements of some contenders.

    Args:
        contenders: Who is measured; the mixture in fewer calls last.
        prompts: What they continue.
        sizes: How much.
        meter: Energy.
    """

    def __init__(self, contenders: Sequence[Contender], prompts: Prompts, sizes: Sizes, meter: Meter) -> None:
        self.contenders = {contender.name: contender for contender in contenders}
        self._fast = self.contenders[FAST]
        self._plain = self.contenders.get(PLAIN) or contenders[0]
        self.prompts, self.meter = prompts, meter
        self.sizes = sizes.within(self._fast.context)
        self._gathered: dict[str, Gathered] = defaultdict(Gathered)
        self._found: dict[tuple[str, str, int], Measurement] = {}
        self.measurements = [*self._plan()]

    def warm_up(self) -> None:
        """Let every graph run once, so that nothing is measured while memory is laid out."""
        for contender in self.contenders.values():
            self._run(contender, 1, 0, tokens=1)

    def result(self, name: str) -> TargetResult:
        """What was found of a contender; what was not measured is missing."""
        contender, gathered, sizes = self.contenders[name], self._gathered[name], self.sizes
        ttft = [(size, self._figure(name, "ttft", size)) for size in sorted({*sizes.prompts, *sizes.contexts})]
        tpot = [(size, self._figure(name, "tpot", size)) for size in sizes.contexts]
        rates = [(size, self._figure(name, "rate", size)) for size in sizes.batches]
        return TargetResult(
            name=name,
            kind=contender.kind,
            format=contender.format,
            files=contender.files,
            prefill=tuple(Prefill(size, found) for size, found in ttft if found),
            decode=tuple(Decode(size, found) for size, found in tpot if found),
            batches=tuple(Batch(size, found) for size, found in rates if found),
            speculation=speculation(gathered.runs) if gathered.runs else None,
            energy=_energy(gathered.joules),
        )

    def missing(self) -> list[str]:
        """What there was no time for."""
        return [each.name for each in self.measurements if not each.turns]

    def unstable(self) -> list[str]:
        """What was measured, but is not stable."""
        return [each.name for each in self.measurements if each.turns and not each.stable]

    def _plan(self) -> Iterator[Measurement]:
        """The most important ones first."""
        sizes, others = self.sizes, [c for c in self.contenders.values() if c.name not in (FAST, PLAIN)]
        yield self._pairs()
        for contender in others:
            yield self._decode(contender, sizes.contexts[0])
        both = [c for c in self.contenders.values() if c.name in (FAST, PLAIN)]
        for size in sizes.prompts:
            crowd = [*both, *others] if sizes.everybody else both
            yield from (self._prefill(contender, size) for contender in crowd)
        for size in sizes.batches:
            crowd = [self._plain, *(c for c in others if sizes.everybody and c is not self._plain)]
            yield from (self._batch(contender, size) for contender in crowd)
        for size in sizes.contexts[1:]:
            yield from (self._decode(contender, size) for contender in [*both, *others])

    def _pairs(self) -> Measurement:
        """The mixture plainly and in fewer calls, in turns on the same prompts, as many of them in every round."""
        size = self.sizes.contexts[0]

        def take(_: int) -> Mapping[str, Sequence[float]]:
            found: dict[str, list[float]] = defaultdict(list)
            for number in range(self.sizes.texts):
                pair = [self._run(contender, size, number) for contender in (self._plain, self._fast)]
                self._gathered[FAST].runs.append((pair[0], pair[1]))
                for contender, run in zip((self._plain, self._fast), pair, strict=True):
                    found[f"{contender.name} ttft"].append(run.ttft)
                    found[f"{contender.name} tpot"] += run.tpot
            return found

        measurement = Measurement(f"{FAST}, {size} tokens of context", take)
        for name in {self._fast.name, *({PLAIN} & self.contenders.keys())}:
            self._found[name, "ttft", size] = self._found[name, "tpot", size] = measurement
        return measurement

    def _decode(self, contender: Contender, size: int) -> Measurement:
        def take(number: int) -> Mapping[str, Sequence[float]]:
            run = self._run(contender, size, number if contender.plain else 0)
            return {f"{contender.name} ttft": [run.ttft], f"{contender.name} tpot": run.tpot}

        measurement = Measurement(f"{contender.name}, {size} tokens of context", take)
        self._found[contender.name, "ttft", size] = self._found[contender.name, "tpot", size] = measurement
        return measurement

    def _prefill(self, contender: Contender, size: int) -> Measurement:
        def take(number: int) -> Mapping[str, Sequence[float]]:
            # Whom the mixture asks in fewer calls depends on the text: every round has the same ones.
            texts = [number] if contender.plain else range(self.sizes.texts)
            return {f"{contender.name} ttft": [self._run(contender, size, text, tokens=0).ttft for text in texts]}

        measurement = Measurement(f"{contender.name}, a prompt of {size} tokens", take)
        self._found[contender.name, "ttft", size] = measurement
        return measurement

    def _batch(self, contender: Contender, size: int) -> Measurement:
        def take(_: int) -> Mapping[str, Sequence[float]]:
            prompts = self.prompts.batch(self.sizes.contexts[0], size)
            run = contender.run(prompts, self.sizes.tokens // 2, meter=self.meter, patience=self.sizes.patience)
            return {f"{contender.name} rate": [size / seconds for seconds in run.tpot]}

        measurement = Measurement(f"{contender.name}, {size} texts at once", take)
        self._found[contender.name, "rate", size] = measurement
        return measurement

    def _run(self, contender: Contender, size: int, number: int, *, tokens: int | None = None) -> Run:
        prompt = self.prompts.take(size, number)
        new = self.sizes.tokens if tokens is None else tokens
        run = contender.run([prompt], new, meter=self.meter, patience=self.sizes.patience)
        if tokens is None and run.tokens:
            for counter, joules in run.joules.items():
                self._gathered[contender.name].joules[counter].append(joules / run.tokens)
        return run

    def _figure(self, name: str, figure: str, size: int) -> Quantiles | None:
        measurement = self._found.get((name, figure, size))
        return measurement.figure(f"{name} {figure}") if measurement else None


def speculation(runs: Sequence[tuple[Run, Run]]) -> SpeculationResult:
    """What fewer calls bring, from pairs of a plain run and one in fewer calls."""
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
    """Of the counter that counts most: the package where the CPU computes, the card where that does."""
    medians = {counter: statistics.median(found) for counter, found in joules.items()}
    counter = max(medians, key=lambda name: medians[name], default=None)
    return None if counter is None else Energy(counter, medians[counter])
