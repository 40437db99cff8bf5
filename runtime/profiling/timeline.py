"""A timeline of generating a text: spans on tracks, for the time outside ONNX Runtime and for trace files.

The production path carries one hook, around a graph's call (`DecoderGraph.watched`). The other spans wrap methods of
the one decoding that is observed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.results.profile import Overhead
from edgemix.runtime.decoding.static_batch import StaticBatch
from edgemix.runtime.text.detokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.profiling.targets import Target
    from edgemix.runtime.text.tokenizer import Tokenizer

_OURS = "edgemix: "  # no member can have such a name
STEPS, MIXING, SAMPLING = "edgemix: steps", "edgemix: mixing", "edgemix: sampling"
TOKENIZER, DRAFTING = "edgemix: tokenizer", "edgemix: drafting"

# Methods whose time is measured, with their tracks.
_BATCH_SEQUENCE_METHODS = {"choose": SAMPLING, "mix": MIXING}
_SPECULATIVE_METHODS = {"_choose": SAMPLING, "_find_draft": DRAFTING}
_LAZY_STATE_METHODS = {"partial_probabilities": MIXING, "member_probabilities": MIXING, "scores": MIXING}


@dataclass(frozen=True, slots=True)
class Span:
    """An interval on a track, `time.perf_counter()` from begin to end.

    Attributes:
        own: Seconds that are not in spans nested within it.
    """

    track: str
    name: str
    begin: float
    end: float
    own: float
    tokens: int = 0


class Timeline:
    """Spans, which may be nested.

    Attributes:
        spans: All spans that have ended.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._within: list[float] = []

    @contextmanager
    def span(self, track: str, name: str = "", tokens: int = 0) -> Iterator[None]:
        """Record a span that lasts as long as this context."""
        begin = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            end = time.perf_counter()
            inner = self._within.pop()
            if self._within:
                self._within[-1] += end - begin
            self.spans.append(Span(track, name or track.removeprefix(_OURS), begin, end, end - begin - inner, tokens))

    def watch(self, ensemble: Ensemble) -> Ensemble:
        """Return the ensemble with every call of a graph recorded as a span on a track of the member's name."""

        def call(name: str, tokens: int) -> Any:
            return self.span(name, "1 token" if tokens == 1 else f"{tokens} tokens", tokens)

        return replace(ensemble, graphs=tuple(graph.watched(call) for graph in ensemble.graphs))

    def own(self, spans: Iterable[Span] | None = None) -> dict[str, float]:
        """Return track -> seconds of its spans without those nested in them."""
        seconds: dict[str, float] = defaultdict(float)
        for span in self.spans if spans is None else spans:
            seconds[span.track] += span.own
        return seconds

    def around(self, thing: object, methods: dict[str, str]) -> None:
        """Record every call of an object's methods, those that it has, as a span on a track."""
        for method, track in methods.items():
            if hasattr(thing, method):
                setattr(thing, method, self._around(getattr(thing, method), track))

    def _around(self, function: Callable[..., Any], track: str) -> Callable[..., Any]:
        @wraps(function)
        def spanned(*arguments: Any) -> Any:
            with self.span(track):
                return function(*arguments)

        return spanned


def watch(
    target: Target, prompt: Sequence[int], new: int, tokenizer: Tokenizer, *, patience: float
) -> tuple[Timeline, int]:
    """Generate a text with everything on a timeline: that, and the number of tokens written after the first step, fewer
    where more than `patience` seconds have passed.
    """
    timeline, written, begun = Timeline(), 0, time.perf_counter()
    watched = replace(
        target,
        ensemble=timeline.watch(target.ensemble),
        student=timeline.watch(target.student) if target.student else None,
    )
    decoder = IncrementalDecoder(tokenizer, prompt)
    with closing(watched.start([prompt], new + 1)) as decoding:
        if isinstance(decoding, StaticBatch):
            decoding.batch.on_join = partial(timeline.around, methods=_BATCH_SEQUENCE_METHODS)
        else:
            timeline.around(decoding, _SPECULATIVE_METHODS)
            timeline.around(decoding.state, _LAZY_STATE_METHODS)
        first = True
        while not written or time.perf_counter() - begun < patience:
            with timeline.span(STEPS, "prompt" if first else "step"):
                step = decoding.step()
            if not step:
                break
            with timeline.span(TOKENIZER):
                for token in step:
                    decoder.add(token.id)
            written += 0 if first else len(step)
            first = False
    return timeline, written


def overhead(timeline: Timeline, tokens: int, encode: float) -> Overhead | None:
    """Return the time outside ONNX Runtime per token generated after the prompt; None where there was none.

    Args:
        timeline: The timeline of one text.
        tokens: Number of tokens generated in it.
        encode: Seconds of encoding per prompt token.
    """
    first = min((span.end for span in timeline.spans if span.track == STEPS), default=0.0)
    own = timeline.own(span for span in timeline.spans if span.begin >= first)
    if not tokens:
        return None
    return Overhead(
        tokenizer=own[TOKENIZER] / tokens,
        mixing=own[MIXING] / tokens,
        sampling=own[SAMPLING] / tokens,
        other=(own[STEPS] + own[DRAFTING]) / tokens,
        encode=encode,
    )


def encoding_seconds(tokenizer: Tokenizer, text: str) -> float:
    """Measure the seconds per token of encoding a text, best of three."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        ids = tokenizer.encode(text)
        seconds.append((time.perf_counter() - begun) / len(ids))
    return min(seconds)


class Trace:
    """A file for Perfetto and chrome://tracing (Trace Event Format); each observed target is a process."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._processes = 0

    def add(self, name: str, spans: Iterable[Span]) -> None:
        """Add one run, its tracks in the order in which they begin; time begins at 0."""
        ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
        if not ordered:
            return
        self._processes += 1
        start, tracks = ordered[0].begin, list(dict.fromkeys(span.track for span in ordered))
        self._events.append(_named("process_name", name, self._processes, 0))
        for number, track in enumerate(tracks):
            self._events.append(_named("thread_name", track, self._processes, number))
            self._events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": self._processes, "tid": number}
                | {"args": {"sort_index": number}}
            )
        for span in ordered:
            event = {"ph": "X", "name": span.name, "cat": span.track, "pid": self._processes}
            event |= {"tid": tracks.index(span.track), "ts": round((span.begin - start) * 1e6, 3)}
            event |= {"dur": round((span.end - span.begin) * 1e6, 3)}
            self._events.append(event | ({"args": {"tokens": span.tokens}} if span.tokens else {}))

    def encode(self) -> bytes:
        """Return the file's bytes."""
        return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": self._events})


def _named(what: str, name: str, process: int, track: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
