"""The variants of running a mixture on this machine, and the best of them."""

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
from edgemix.runtime.machine.plan import RuntimePlan, key_of
from edgemix.runtime.mixture import Mixture
from edgemix.runtime.options import Speculation
from edgemix.runtime.profiling.targets import list_modes
from edgemix.runtime.profiling.timing import ROUNDS, Measurement, take_turns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest
    from edgemix.progress import Progress
    from edgemix.runtime.mixing.ensemble import WeightChoice
    from edgemix.runtime.profiling.bench import Sizes
    from edgemix.runtime.profiling.energy import Meter
    from edgemix.runtime.profiling.prompts import Prompts
    from edgemix.runtime.profiling.targets import Target

NEARLY = 1.02
"""Variants up to this factor slower than the fastest count as equal: then one without student, or with fewer threads,
wins."""
MIN_TOKENS = 48
"""Minimum tokens of a run: the student reads the prompt before its first draft, and draft lengths adapt."""
_SIMPLEST = ("lookup", "off", "auto", "student")


def thread_counts(cores: int) -> list[int]:
    """Return powers of two below the number of cores, and that number, in descending order."""
    return sorted({cores, *(1 << power for power in range(cores.bit_length()) if 1 << power < cores)}, reverse=True)


@dataclass(frozen=True)
class VariantBench:
    """Measures variants of one bundle.

    Attributes:
        bundle, manifest: The verified folder, and its manifest.
        weights: The members' weights.
        all_modes: Measure every speculation mode, not only "off" and "auto".
        prompts: Texts to continue.
        sizes: The first context and the number of texts count, and the tokens where they are more than `MIN_TOKENS`.
        meter: Energy meter.
    """

    bundle: Path
    manifest: Manifest
    weights: WeightChoice
    all_modes: bool
    prompts: Prompts
    sizes: Sizes
    meter: Meter

    def variants(self, provider: str, threads: int, *, until: float, progress: Progress) -> list[Variant]:
        """Load the mixture with these settings and measure its speculation modes.

        Raises:
            BundleError, EdgemixError: It cannot be loaded with these settings, or fails.
        """
        where = f"{provider}, {threads} thread{'s' if threads > 1 else ''}"
        with closing(Mixture.assemble(self.bundle, self.manifest, provider, threads, drafts=True)) as mixture:
            usual = ("off", "auto" if mixture.drafting else "lookup")
            tried = [mode for mode in list_modes(mixture, self.weights) if self.all_modes or mode.speculation in usual]
            measured = [self._measurement(mode, self.sizes.within(mixture.context)) for mode in tried]
            take_turns(measured, until=until, rounds=ROUNDS + 1, title=where, progress=progress)
        return [
            Variant(threads, provider, measurement.name, tpot, measurement.figure("ttft"))
            for measurement in measured
            if (tpot := measurement.figure("tpot"))
        ]

    def _measurement(self, mode: Target, sizes: Sizes) -> Measurement:
        """Measure one mode; samples are means over all texts, as some are easier to draft than others."""

        def take(_: int) -> Mapping[str, Sequence[float]]:
            prompts = (self.prompts.take(sizes.contexts[0], number) for number in range(sizes.texts))
            count = max(MIN_TOKENS, sizes.tokens)
            runs = [mode.run([ids], count, meter=self.meter, patience=4 * sizes.patience) for ids in prompts]
            tokens = sum(run.tokens for run in runs)
            return {
                "tpot": [sum(run.seconds for run in runs) / tokens] if tokens else [],
                "ttft": [run.ttft for run in runs],
            }

        return Measurement(mode.speculation, take)


def measure_variants(
    bench: VariantBench,
    providers: Sequence[str],
    threads: Sequence[int],
    *,
    until: float,
    progress: Progress = NO_PROGRESS,
) -> tuple[list[Variant], list[str]]:
    """Measure speculation modes by provider and number of threads, the most promising ones first.

    Args:
        bench: Measures them.
        providers, threads: What to combine.
        until: `time.perf_counter()` when it ends; what cannot be done by then is missing.
        progress: Progress callback.

    Returns:
        The variants, and a line for each combination that failed.
    """
    places = [*product(providers, threads)]
    found: list[Variant] = []
    failures: list[str] = []
    for number, (provider, count) in enumerate(places):
        begun = time.perf_counter()
        share = (until - begun) / (len(places) - number)
        if share <= 0:
            break
        try:
            found += bench.variants(provider, count, until=begun + share, progress=progress)
        except EdgemixError as error:  # another provider may have too little memory
            failures.append(f"{provider}, threads: {count}: {error.message}")
    return found, failures


def best_of(variants: Sequence[Variant]) -> Variant:
    """Return the fastest variant; among nearly equal ones, the one without student and with fewer threads.

    Raises:
        ValueError: There are no variants.
    """
    fastest = min(variant.tpot.p50 for variant in variants)
    nearly = [variant for variant in variants if variant.tpot.p50 <= NEARLY * fastest]
    return min(nearly, key=lambda variant: (_SIMPLEST.index(variant.speculation), variant.threads))


def plan_of(variant: Variant, manifest: Manifest) -> RuntimePlan:
    """Return the plan for running a bundle as a variant."""
    return RuntimePlan(
        key=key_of(manifest, PROVIDERS[variant.provider]),
        threads=variant.threads,
        speculation=msgspec.convert(variant.speculation, Speculation),
        drafts=manifest.student is not None and variant.speculation in ("auto", "student"),
        tpot=variant.tpot.p50,
        created=now(),
    )


def working_providers(first: str) -> list[str]:
    """Return the names of the providers that work here, `first` first; CUDA graphs only where asked for."""
    others = [row for name, row in PROVIDERS.items() if name != first and not row.captures]
    return [first, *(row.name for row in others if not why_not(row))]


def now() -> str:
    """Return the current time in UTC, ISO 8601."""
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
