"""The ways to run a mixture that this machine could use, and which one is best."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING

import msgspec

from edgemix.profile import Variant
from edgemix.runtime.mixture import Mixture
from edgemix.runtime.options import Speculation
from edgemix.runtime.plan import Plan, key_of
from edgemix.runtime.profiling.contenders import ways
from edgemix.runtime.profiling.timing import ROUNDS, Measurement, take_turns
from edgemix.runtime.providers import PROVIDERS, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgemix.manifest import Manifest
    from edgemix.progress import Progress
    from edgemix.runtime.options import WeightChoice
    from edgemix.runtime.profiling.contenders import Contender
    from edgemix.runtime.profiling.energy import Meter
    from edgemix.runtime.profiling.prompts import Prompts
    from edgemix.runtime.profiling.subjects import Sizes

NEARLY = 1.02
"""How much slower than the fastest one may be and still count as fast: then no student wins, and fewer threads."""
_SIMPLEST = ("lookup", "off", "auto", "student")


def thread_counts(cores: int) -> list[int]:
    """Powers of two below the number of cores, and that number, the largest first."""
    return sorted({cores, *(1 << power for power in range(cores.bit_length()) if 1 << power < cores)}, reverse=True)


def measure_variants(
    bundle: Path,
    manifest: Manifest,
    *,
    providers: Sequence[str],
    threads: Sequence[int],
    weights: WeightChoice,
    all_ways: bool,
    prompts: Prompts,
    sizes: Sizes,
    meter: Meter,
    until: float,
    progress: Progress,
) -> list[Variant]:
    """The mixture in its ways to generate, by provider and number of threads, each opened anew.

    Args:
        bundle: The folder; checked.
        manifest: Its own.
        providers, threads: Which; the most likely ones first.
        weights: Of the members.
        all_ways: Every way to generate, not only the plain one and "auto".
        prompts: Texts to continue.
        sizes: The first context, the tokens and the number of texts count.
        meter: For the runs.
        until: When it ends; what cannot be done by then is missing.
        progress: Hears of it.
    """
    places = [(provider, count) for provider, count in product(providers, threads)]
    found: list[Variant] = []
    for number, (provider, count) in enumerate(places):
        begun = time.perf_counter()
        share = (until - begun) / (len(places) - number)
        if share <= 0:
            break
        with closing(Mixture.assemble(bundle, manifest, provider, count, drafts=True)) as mixture:
            ended = [way for way in ways(mixture, weights) if all_ways or way.speculation in ("off", _best(mixture))]
            measured = {way: _measurement(way, prompts, sizes.within(mixture.context), meter) for way in ended}
            where = f"{provider}, {count} thread{'s' if count > 1 else ''}"
            take_turns([*measured.values()], until=begun + share, rounds=ROUNDS + 1, title=where, progress=progress)
        found += _variants(measured, provider, count)
    return found


def _best(mixture: Mixture) -> str:
    return "lookup" if mixture.drafting is None else "auto"


def _measurement(way: Contender, prompts: Prompts, sizes: Sizes, meter: Meter) -> Measurement:
    def take(_: int) -> Mapping[str, Sequence[float]]:
        runs = [
            way.run([prompts.take(sizes.contexts[0], number)], sizes.tokens, meter=meter, patience=sizes.patience)
            for number in range(sizes.texts)
        ]
        return {"tpot": [run.seconds / run.tokens for run in runs if run.tokens], "ttft": [run.ttft for run in runs]}

    return Measurement(way.name, take)


def _variants(measured: Mapping[Contender, Measurement], provider: str, threads: int) -> Iterator[Variant]:
    for way, measurement in measured.items():
        if tpot := measurement.figure("tpot"):
            yield Variant(threads, provider, way.speculation, tpot, measurement.figure("ttft"))


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
    """Names of the providers that work here, that one first."""
    return [first, *(name for name, row in PROVIDERS.items() if name != first and not why_not(row))]


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
