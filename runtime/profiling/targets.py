"""The targets of a profile: each member alone, the student alone, the mixture plainly and with speculation."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.decoding.speculative import SpeculativeDecoding
from edgemix.runtime.decoding.static_batch import StaticBatch
from edgemix.runtime.profiling.loading import files_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.bundle.ngram_table import NgramTable
    from edgemix.results.profile import TargetKind
    from edgemix.runtime.mixing.ensemble import Ensemble, WeightChoice
    from edgemix.runtime.mixture import Mixture
    from edgemix.runtime.options import Speculation
    from edgemix.runtime.profiling.energy import Meter

PLAIN, FAST = "mixture, plain", "mixture"
MIN_TOKENS = 4
"""Tokens that are decoded at least."""


@dataclass(frozen=True)
class Run:
    """Timing of one generated text or batch.

    Attributes:
        ttft: Seconds from the prompt's token ids to the first token (of each text).
        tpot: Seconds of every later step; with speculation, where a step gives several tokens, their mean per token.
        tokens: Tokens generated after the first step, in `seconds`.
        calls, drafted, accepted: See `SpeculativeDecoding`; after the first step.
        joules: Energy of those tokens, by counter.
    """

    ttft: float
    tpot: Sequence[float]
    tokens: int
    seconds: float
    calls: int
    drafted: int
    accepted: int
    joules: dict[str, float]


@dataclass(frozen=True, eq=False)
class Target:
    """A way to generate that is measured.

    Attributes:
        name, kind, format, files: As in the profile's `TargetResult`.
        entries: Manifest entries of its graphs.
        ensemble: The graphs and their weights.
        speculation: Where drafts come from; "off" for the plain loop.
        context: Most tokens of a sequence.
        student: The drafting student, if loaded; `ngrams`, if the bundle has them.
    """

    name: str
    kind: TargetKind
    format: str
    files: int
    entries: tuple[MemberEntry, ...]
    ensemble: Ensemble
    speculation: Speculation
    context: int
    student: Ensemble | None = None
    ngrams: NgramTable | None = None

    @property
    def plain(self) -> bool:
        return self.speculation == "off"

    def start(self, prompts: Sequence[Sequence[int]], new: int) -> StaticBatch | SpeculativeDecoding:
        """Start greedy generation of `new` tokens that ignores the end of text; the caller closes it."""
        if self.plain:
            seeds = [0] * len(prompts)
            return StaticBatch(
                self.ensemble, prompts, Sampling(), seeds=seeds, max_new_tokens=new, context=self.context, eos=()
            )
        (prompt,) = prompts
        return SpeculativeDecoding(
            self.ensemble,
            prompt,
            Sampling(),
            seed=None,
            max_new_tokens=new,
            context=self.context,
            eos=(),
            student=self.student if self.speculation in ("auto", "student") else None,
            lookup=self.speculation in ("auto", "lookup"),
            ngrams=self.ngrams if self.speculation in ("auto", "lookup") else None,
        )

    def run(self, prompts: Sequence[Sequence[int]], new: int, *, meter: Meter, patience: float) -> Run:
        """Generate `new` tokens after the first, or fewer where that would take longer than `patience` seconds."""
        steps, tokens = [], 0
        begun = time.perf_counter()
        with closing(self.start(prompts, new + 1)) as decoding:
            decoding.step()
            first = last = time.perf_counter()
            before, readings = _counts(decoding), meter.readings()
            while step := decoding.step():
                now = time.perf_counter()
                steps.append(now - last)
                tokens, last = tokens + len(step), now
                if now - first > patience and tokens >= MIN_TOKENS * len(prompts):
                    break
            seconds = last - first
            joules = meter.spent(readings)
            calls, drafted, accepted = (now - was for now, was in zip(_counts(decoding), before, strict=True))
        tpot = steps if self.plain else [seconds / tokens] if tokens else []
        return Run(first - begun, tpot, tokens, seconds, calls, drafted, accepted, joules)


def _counts(decoding: StaticBatch | SpeculativeDecoding) -> tuple[int, int, int]:
    if isinstance(decoding, StaticBatch):
        return 0, 0, 0
    return decoding.calls, decoding.drafted, decoding.accepted


def list_targets(mixture: Mixture, weights: WeightChoice = None, *, student: Mixture | None = None) -> list[Target]:
    """Return the targets of a loaded bundle; a single member has no plain mixture.

    Args:
        mixture: The bundle's.
        weights: The members' weights.
        student: The student alone, where the mixture drafts with another graph of it.
    """
    manifest = mixture.manifest
    found = [
        _alone(mixture, entry, "member", mixture.ensemble(dict.fromkeys([entry.name], 1.0)))
        for entry in manifest.members
    ]
    if mixture.drafting is not None and manifest.student is not None:
        alone = mixture.drafting if student is None else student.ensemble()
        found.append(_alone(mixture, manifest.student, "student", alone))
    ensemble = mixture.ensemble(weights)
    if len(manifest.members) > 1:
        found.append(_mixture(mixture, PLAIN, ensemble, "off"))
    return [*found, _mixture(mixture, FAST, ensemble, "auto")]


def list_modes(mixture: Mixture, weights: WeightChoice = None) -> list[Target]:
    """Return the mixture as one target for each speculation mode that its bundle allows."""
    ensemble = mixture.ensemble(weights)
    names: list[Speculation] = ["off", "lookup", *(("student",) if mixture.drafting else ())]
    return [_mixture(mixture, name, ensemble, name) for name in (*names, *(("auto",) if mixture.drafting else ()))]


def _alone(mixture: Mixture, entry: MemberEntry, kind: TargetKind, ensemble: Ensemble) -> Target:
    return Target(
        entry.name,
        kind,
        entry.format,
        _bytes(mixture.manifest, files_of(mixture.manifest, entry.name)),
        (entry,),
        ensemble,
        "off",
        mixture.context,
    )


def _mixture(mixture: Mixture, name: str, ensemble: Ensemble, speculation: Speculation) -> Target:
    manifest = mixture.manifest
    active = {member.name for member in ensemble.graphs}
    # A graph of several members has the first one's name.
    entries = tuple(entry for entry in _graphs(manifest) if entry.name in active)
    files = {file for entry in manifest.members for file in files_of(manifest, entry.name)}
    formats = ", ".join(dict.fromkeys(entry.format for entry in manifest.members))
    return Target(
        name,
        "mixture",
        formats,
        _bytes(manifest, files),
        entries,
        ensemble,
        speculation,
        mixture.context,
        mixture.drafting,
        mixture.ngrams,
    )


def _graphs(manifest: Manifest) -> list[MemberEntry]:
    """Return the first member of every graph."""
    return list({entry.graph: entry for entry in reversed(manifest.members)}.values())[::-1]


def _bytes(manifest: Manifest, files: set[str] | tuple[str, ...]) -> int:
    return sum(manifest.files[file].size for file in files)
