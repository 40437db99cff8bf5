"""The ways to run a mixture that this machine could use, and which one is best."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING

import msgspec

from edgemix.errors import EdgemixError
from edgemix.progress import NO_PROGRESS
from edgemix.results.profile import Variant
from edgemix.runtime.graphs.providers import PROVIDERS, why_not
from edgemix.runtime.machine.plan import Plan, key_of
from edgemix.runtime.mixture import Mixture
from edgemix.runtime.options import Speculation
from edgemix.runtime.profiling.targets import ways
from edgemix.runtime.profiling.timing import ROUNDS, Measurement, take_turns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest
    from edgemix.progress import Progress
    from edgemix.runtime.options import WeightChoice
    from edgemix.runtime.profiling.bench import Sizes
    from edgemix.runtime.profiling.energy import Meter
    from edgemix.runtime.profiling.prompts import Prompts
    from edgemix.runtime.profiling.targets import Contender

NEARLY = 1.02
"""How much slower than the fastest one may be and still count as fast: then no student wins, and fewer threads."""
WRITTEN = 48
"""Tokens of a run, at least: the student reads the prompt before its first draft, and drafts find their length."""
_SIMPLEST = ("lookup", "off", "auto", "student")


def thread_counts(cores: int) -> list[int]:
    """Powers of two below the number of cores, and that number, the largest first."""
    return sorted({cores, *(1 << power for power in range(cores.bit_length()) if 1 << power < cores)}, reverse=True)


@dataclass(frozen=True)
class Trial:
    """What all variants are measured with.

    Attributes:
        bundle, manifest: The folder, checked, and its own manifest.
        weights: Of the members.
        all_ways: Every way to generate, not only the plain one and "auto".
        prompts: Texts to continue.
        sizes: The first context and the number of texts count, and the tokens where they are more than `WRITTEN`.
        meter: For the runs.
    """

    bundle: Path
    manifest: Manifest
    weights: WeightChoice
    all_ways: bool
    prompts: Prompts
    sizes: Sizes
    meter: Meter

    def variants(self, provider: str, threads: int, *, until: float, progress: Progress) -> list[Variant]:
        """The mixture in its ways to generate, opened anew.

        Raises:
            BundleError, EdgemixError: It cannot be opened so, or fails.
        """
        where = f"{provider}, {threads} thread{'s' if threads > 1 else ''}"
        with closing(Mixture.assemble(self.bundle, self.manifest, provider, threads, drafts=True)) as mixture:
            usual = ("off", "auto" if mixture.drafting else "lookup")
            tried = [way for way in ways(mixture, self.weights) if self.all_ways or way.speculation in usual]
            measured = [self._measurement(way, self.sizes.within(mixture.context)) for way in tried]
            take_turns(measured, until=until, rounds=ROUNDS + 1, title=where, progress=progress)
        return [
            Variant(threads, provider, measurement.name, tpot, measurement.figure("ttft"))
            for measurement in measured
            if (tpot := measurement.figure("tpot"))
        ]

    def _measurement(self, way: Contender, sizes: Sizes) -> Measurement:
        """Samples are means over all texts, as some are easier to draft than others."""

        def take(_: int) -> Mapping[str, Sequence[float]]:
            prompts = (self.prompts.take(sizes.contexts[0], number) for number in range(sizes.texts))
            count = max(WRITTEN, sizes.tokens)
            runs = [way.run([ids], count, meter=self.meter, patience=4 * sizes.patience) for ids in prompts]
            tokens = sum(run.tokens for run in runs)
            return {
                "tpot": [sum(run.seconds for run in runs) / tokens] if tokens else [],
                "ttft": [run.ttft for run in runs],
            }

        return Measurement(way.speculation, take)


def measure_variants(
    trial: Trial, providers: Sequence[str], threads: Sequence[int], *, until: float, progress: Progress = NO_PROGRESS
) -> tuple[list[Variant], list[str]]:
    """The mixture in its ways to generate, by provider and number of threads, the most likely ones first.

    Args:
        trial: With what.
        providers, threads: Which.
        until: `time.perf_counter()` when it ends; what cannot be done by then is missing.
        progress: Hears of it.

    Returns:
        The variants, and what did not work, a line each.
    """
    places = [*product(providers, threads)]
    found: list[Variant] = []
    troubles: list[str] = []
    for number, (provider, count) in enumerate(places):
        begun = time.perf_counter()
        share = (until - begun) / (len(places) - number)
        if share <= 0:
            break
        try:
            found += trial.variants(provider, count, until=begun + share, progress=progress)
        except EdgemixError as error:  # another provider may have too little memory
            troubles.append(f"{provider}, threads: {count}: {error.message}")
    return found, troubles


def best_of(variants: Sequence[Variant]) -> Variant:
    """The fastest; of those that are nearly as fast, the one that needs least: no student, fewer threads.

    Raises:
        ValueError: There are none.
    """
    fastest = min(variant.tpot.p50 for variant in variants)
    nearly = [variant for variant in variants if variant.tpot.p50 <= NEARLY * fastest]
    return min(nearly, key=lambda variant: (_SIMPLEST.index(variant.speculation), variant.threads))


def plan_of(variant: Variant, manifest: Manifest) -> Plan:
    """The plan that says to run a bundle this way."""
    return Plan(
        key=key_of(manifest, PROVIDERS[variant.provider]),
        threads=variant.threads,
        speculation=msgspec.convert(variant.speculation, Speculation),
        drafts=manifest.student is not None and variant.speculation in ("auto", "student"),
        tpot=variant.tpot.p50,
        created=now(),
    )


def working_providers(first: str) -> list[str]:
    """Names of the providers that work here, that one first; recording calls is for those who ask for it."""
    others = [row for name, row in PROVIDERS.items() if name != first and not row.captures]
    return [first, *(row.name for row in others if not why_not(row))]


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
