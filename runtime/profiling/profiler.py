"""Run all measurements of a bundle within a time limit and collect them in a `Profile`."""

from __future__ import annotations

import gc
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from edgemix import __version__
from edgemix.bundle.paths import resolve
from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.errors import EdgemixError
from edgemix.progress import NO_PROGRESS
from edgemix.results.profile import Machine, Profile
from edgemix.runtime.graphs.providers import choose
from edgemix.runtime.machine.plan import write_plan
from edgemix.runtime.machine.system import describe
from edgemix.runtime.mixing.ensemble import ADAPTIVE, WeightResolver
from edgemix.runtime.mixture import Mixture
from edgemix.runtime.processor import default_threads
from edgemix.runtime.profiling import loading, operators
from edgemix.runtime.profiling.background_load import NOTABLE_LOAD, BackgroundLoad
from edgemix.runtime.profiling.bench import Bench, Sizes
from edgemix.runtime.profiling.energy import Meter, counters
from edgemix.runtime.profiling.graphs import read_graph
from edgemix.runtime.profiling.limits import bandwidth, measure_limits
from edgemix.runtime.profiling.prompts import PASSAGES, Prompts
from edgemix.runtime.profiling.roofline import Work, roofline_point
from edgemix.runtime.profiling.targets import list_targets
from edgemix.runtime.profiling.timeline import Trace, encoding_seconds, overhead, watch
from edgemix.runtime.profiling.timing import take_turns
from edgemix.runtime.profiling.variants import (
    VariantBench,
    best_of,
    measure_variants,
    now,
    plan_of,
    thread_counts,
    working_providers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.progress import Progress
    from edgemix.results.profile import Breakdown, Loading, RooflinePoint, TargetResult, Variant
    from edgemix.runtime.graphs.providers import Provider
    from edgemix.runtime.mixing.ensemble import WeightChoice
    from edgemix.runtime.profiling.targets import Target
    from edgemix.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        bundle: The bundle's folder.
        provider, threads, verify: As for `Mixture.load`; plans are ignored.
        weights: The mixture's weights, see `WeightChoice`; `weights_name` is their text on the command line.
        quick: Finish in less than half a minute.
        recommend: Measure all variants, and keep the best as this machine's plan.
        text: Text to continue in place of the built-in one.
    """

    bundle: Path
    provider: str = "auto"
    threads: int | None = None
    verify: bool = True
    weights: WeightChoice = None
    weights_name: str = ""
    quick: bool = False
    recommend: bool = False
    text: str | None = None


@dataclass(frozen=True)
class MeasurementSettings:
    """Time limit in seconds, and for each stage the share of it at which the stage ends.

    Attributes:
        more: Extra seconds for recommending, whatever time it is.
        loads: Numbers of cold and warm loads of the mixture; `each`: of every graph alone.
    """

    seconds: float
    more: float
    limits: float
    loads: tuple[int, int]
    each: tuple[int, int]
    loaded: float
    turns: float
    operators: float
    sizes: Sizes


_FEW = 4
"""Up to this number of unstable measurements are listed by name."""
QUICK = MeasurementSettings(
    seconds=26.5,
    more=60,
    limits=0.6,
    loads=(1, 2),
    each=(0, 0),
    loaded=0.25,
    turns=0.77,
    operators=0.98,
    sizes=Sizes((64,), (256,), (4,), tokens=16, texts=2, all_targets=False, patience=1.0),
)
THOROUGH = MeasurementSettings(
    seconds=165,
    more=150,
    limits=2,
    loads=(2, 3),
    each=(1, 2),
    loaded=0.2,
    turns=0.76,
    operators=0.84,
    sizes=Sizes((64, 512), (16, 256, 1024), (4, 16), tokens=24, texts=4, all_targets=True, patience=3.0),
)


@dataclass
class MeasuredProfile:
    """A profile with its trace and plans.

    Attributes:
        trace: A timeline of one text of each target.
        plans: Files of the recommended plans, one for each provider that was tried.
    """

    profile: Profile
    trace: Trace
    plans: tuple[Path, ...] = ()


@dataclass
class _ProfileRun:
    """State of a profile in progress."""

    request: ProfileRequest
    manifest: Manifest
    provider: Provider
    threads: int
    settings: MeasurementSettings
    begun: float
    progress: Progress
    machine: Machine = field(init=False)
    loads: dict[str, Loading] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    notes: list[str] = field(default_factory=list)
    background_load: BackgroundLoad = field(default_factory=BackgroundLoad)

    def by(self, share: float) -> float:
        """Return `time.perf_counter()` at the end of a share of the time limit."""
        return self.begun + share * self.settings.seconds


def profile(request: ProfileRequest, progress: Progress = NO_PROGRESS) -> MeasuredProfile:
    """Measure a bundle on this machine.

    Raises:
        BundleError: The bundle is missing, damaged, unsafe, or its graphs do not load.
        InputError: The weights do not fit this bundle.
        EdgemixError: The provider does not work here, or a measurement fails.
    """
    begun = time.perf_counter()
    manifest = read_manifest(request.bundle)
    verify_bundle(request.bundle, manifest, checksums=request.verify)
    if request.weights != ADAPTIVE:
        WeightResolver.of(manifest).fixed_weights(request.weights)  # fail before any long work
    provider, threads = choose(request.provider), request.threads or default_threads()
    settings = QUICK if request.quick else THOROUGH
    work = _ProfileRun(request, manifest, provider, threads, settings, begun, progress)
    work.loads = _loads(work)
    work.machine = _machine(work)
    with (
        closing(Mixture.assemble(request.bundle, manifest, provider.name, threads, drafts=True)) as mixture,
        _whole_student(work) as student,
    ):
        bench = Bench(
            list_targets(mixture, request.weights, student=student),
            Prompts(mixture.tokenizer, request.text),
            settings.sizes,
            Meter(counters()),
        )
        bench.warm_up()
        take_turns(bench.measurements, until=work.by(settings.turns), progress=progress)
        work.machine = _again(work)
        breakdowns = tuple(_breakdowns(work, bench.prompts))
        results = tuple(_result(work, bench, each, mixture.tokenizer) for each in bench.targets.values())
    _note(work, bench)
    prompts, meter = bench.prompts, bench.meter
    del bench
    gc.collect()  # free the graphs before others are opened
    variants, plans = _variants(work, prompts, meter)
    found = Profile(
        bundle=request.bundle.resolve().name,
        digest=manifest.checksum,
        created=now(),
        quick=request.quick,
        seconds=time.perf_counter() - begun,
        machine=work.machine,
        loading=work.loads[""],
        results=results,
        breakdowns=breakdowns,
        variants=variants,
        notes=tuple(work.notes),
        weights=request.weights_name or (ADAPTIVE if mixture.resolve_weights(request.weights) == ADAPTIVE else ""),
    )
    return MeasuredProfile(found, work.trace, plans)


def _whole_student(work: _ProfileRun) -> AbstractContextManager[Mixture | None]:
    """Load the student alone where the mixture drafts with another graph of it; else give None."""
    entry = work.manifest.student
    if entry is None or entry.draft is None:
        return nullcontext()
    alone = work.manifest.alone(entry)
    return closing(Mixture.assemble(work.request.bundle, alone, work.provider.name, work.threads))


def _loads(work: _ProfileRun) -> dict[str, Loading]:
    """Measure loading everything (""), and each graph alone, as far as time allows."""
    found: dict[str, Loading] = {}
    names = [entry.name for entry in work.manifest.graphs] if len(work.manifest.graphs) > 1 else []
    with work.progress.stage("loading", 1 + len(names)) as task:
        for name in ("", *names):
            request = loading.LoadRequest(str(work.request.bundle), work.provider.name, work.threads, name)
            loads = loading.Loads(request, work.manifest)
            cold, warm = work.settings.each if name else work.settings.loads
            order = [False] * min(1, warm) + [True] * cold + [False] * (warm - 1)
            for number, is_cold in enumerate(order):
                needed = not name and number == 0
                if needed or time.perf_counter() + loads.seconds < work.by(work.settings.loaded):
                    loads.take(cold=is_cold)
            if (loaded := loads.loading()) is not None:
                found[name] = loaded
            if loads.trouble and not name:
                work.notes.append(f"loading cold was not measured: {loads.trouble}")
            task.advance(note=name)
    return found


def _machine(work: _ProfileRun) -> Machine:
    with work.progress.stage("limits of the machine"):
        limits = measure_limits(work.provider, work.threads, seconds=work.settings.limits)
    here = describe()
    return Machine(
        processor=here.processor.name,
        cores=default_threads(),
        instruction_sets=here.processor.instruction_sets,
        memory=here.memory.total,
        platform=here.platform,
        provider=work.provider.name,
        threads=work.threads,
        onnxruntime=here.packages["onnxruntime"] or here.packages["onnxruntime-gpu"] or "",
        edgemix=__version__,
        bandwidth=limits.bandwidth,
        fp32_peak=limits.fp32_peak,
        int8_peak=limits.int8_peak,
    )


def _again(work: _ProfileRun) -> Machine:
    """Return the machine with the better of two bandwidths: its memory may be shared with other machines."""
    machine = work.machine
    if machine.bandwidth is None:
        return machine
    again = bandwidth(work.threads, work.settings.limits / 3)
    return msgspec.structs.replace(machine, bandwidth=max(machine.bandwidth, again))


def _breakdowns(work: _ProfileRun, prompts: Prompts) -> Iterator[Breakdown]:
    """Yield the breakdown of every graph, as far as time allows."""
    entries = {entry.graph: entry for entry in reversed(work.manifest.graphs)}
    prompt = prompts.take(min(work.settings.sizes.contexts[0], _context(work.manifest)))
    seconds, late = 0.0, []
    with work.progress.stage("operators", len(entries)) as task:
        for entry in reversed(entries.values()):
            begun = time.perf_counter()
            if begun + seconds > work.by(work.settings.operators):
                late.append(entry.name)
                continue
            path, members = resolve(work.request.bundle, entry.graph), _member_names(work.manifest, entry)
            try:
                calls = operators.profiled_calls(path, entry, work.provider, work.threads, prompt)
                yield operators.breakdown(members, *calls, read_graph(path).marks())
            except EdgemixError as error:
                work.notes.append(f"the operators of {members} were not measured: {error.message}")
            seconds = time.perf_counter() - begun
            task.advance(note=entry.name)
    if late:
        work.notes.append(f"there was no time for the operators of {', '.join(late)}")


def _context(manifest: Manifest) -> int:
    """Return the longest prompt, in tokens, that leaves room for decoding in every graph."""
    return max(1, min(entry.config.context for entry in manifest.graphs) - operators.DECODES)


def _member_names(manifest: Manifest, first: MemberEntry) -> str:
    """Return a graph's name: the names of its members."""
    return ", ".join(entry.name for entry in manifest.graphs if entry.graph == first.graph)


def _result(work: _ProfileRun, bench: Bench, target: Target, tokenizer: Tokenizer) -> TargetResult:
    """Return a target's result with its overhead outside ONNX Runtime and its roofline points."""
    found, sizes = bench.result(target.name), bench.sizes
    prompt = bench.prompts.take(sizes.contexts[0])
    timeline, tokens = watch(target, prompt, sizes.tokens, tokenizer, patience=sizes.patience)
    work.trace.add(target.name, timeline.spans)
    text = work.request.text or "".join(PASSAGES)
    return msgspec.structs.replace(
        found,
        overhead=overhead(timeline, tokens, encoding_seconds(tokenizer, text[:10_000])),
        roofline=tuple(_roofline_points(work, target, found)),
        loading=work.loads.get(target.name) if target.kind != "mixture" else None,
    )


def _roofline_points(work: _ProfileRun, target: Target, found: TargetResult) -> Iterator[RooflinePoint]:
    """Yield the roofline points of prefill and decoding, where it is known which graphs are called."""
    if not target.plain:
        return
    machine = work.machine
    works = [
        Work.of(read_graph(resolve(work.request.bundle, entry.graph)), member, entry.format)
        for entry, member in zip(target.entries, target.ensemble.graphs, strict=True)
    ]
    if found.prefill:
        longest = found.prefill[-1]
        seconds = longest.ttft.p50
        if over := roofline_point("prefill", works, machine, tokens=longest.tokens, context=0, seconds=seconds):
            yield over
    if found.decode:
        shortest = found.decode[0]
        seconds = shortest.tpot.p50
        if over := roofline_point("decode", works, machine, tokens=1, context=shortest.context, seconds=seconds):
            yield over


def _variants(work: _ProfileRun, prompts: Prompts, meter: Meter) -> tuple[tuple[Variant, ...], tuple[Path, ...]]:
    """Measure variants by provider, threads and speculation; with `recommend` a provider's best becomes its plan."""
    request, settings = work.request, work.settings
    if request.quick and not request.recommend:
        return (), ()
    asked = request.provider != "auto"
    providers = [work.provider.name] if asked else working_providers(work.provider.name)
    bench = VariantBench(
        request.bundle,
        work.manifest,
        request.weights,
        all_modes=request.recommend,
        prompts=prompts,
        sizes=settings.sizes,
        meter=meter,
    )
    found, failures = measure_variants(
        bench,
        providers,
        [request.threads] if request.threads else thread_counts(default_threads()),
        until=max(time.perf_counter(), work.by(1.0)) + settings.more if request.recommend else work.by(1.0),
        progress=work.progress,
    )
    work.notes += failures
    if not request.recommend:
        return tuple(found), ()
    tried = [[variant for variant in found if variant.provider == name] for name in providers]
    best = [best_of(each) for each in tried if each]
    if not best:
        work.notes.append("there is no plan, as no variant of the mixture could be run")
    plans = tuple(write_plan(plan_of(each, work.manifest)) for each in best)
    return tuple(msgspec.structs.replace(each, chosen=each in best) for each in found), plans


def _note(work: _ProfileRun, bench: Bench) -> None:
    """Add notes on missing and unstable measurements, energy and background load."""
    if missing := bench.missing():
        work.notes.append(f"there was no time to measure: {'; '.join(missing)}")
    if unstable := bench.unstable():
        names = f": {'; '.join(unstable)}" if len(unstable) <= _FEW else ""
        work.notes.append(f"{len(unstable)} measurements are not stable in the rounds that there was time for{names}")
    if not bench.meter.counters:
        work.notes.append("energy was not measured: this machine has no counter that can be read")
    if (share := work.background_load.share()) > NOTABLE_LOAD:
        work.notes.append(f"other processes used {share:.0%} of the processor meanwhile, which makes the figures worse")
