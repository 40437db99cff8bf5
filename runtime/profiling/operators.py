"""A graph's time by operator type and by part of the model, from ONNX Runtime's profiler."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgemix.errors import EdgemixError, storage_errors
from edgemix.results.profile import Breakdown, LayerTime, Operator
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.graphs.providers import eager, open_session
from edgemix.runtime.profiling.graphs import EMBEDDING, HEAD, OTHER, mark_of_name, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgemix.bundle.manifest import MemberEntry
    from edgemix.runtime.graphs.providers import Provider

PREFILLS, DECODES = 4, 9
"""Calls of each kind; the first one is a warm-up."""
_KERNEL = "_kernel_time"


class _Event(msgspec.Struct):
    """One event of the profiler's file; times in microseconds."""

    cat: str
    name: str
    ts: int
    dur: int
    args: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node's run, seconds from the beginning of its call."""

    type: str
    name: str
    begin: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a graph and its nodes, in the order of execution."""

    seconds: float
    kernels: tuple[Kernel, ...]


def profiled_calls(
    path: Path, entry: MemberEntry, provider: Provider, threads: int, prompt: Sequence[int]
) -> tuple[int, list[Call], list[Call]]:
    """Profile calls of a graph with a prompt, cut to what one call can read, and with one token after it.

    Returns:
        The number of tokens of the prompt, the prefill calls and the decode calls.

    Raises:
        EdgemixError: The profiler's file cannot be written or read.
    """
    provider = eager(provider)  # the profiler cannot see inside a CUDA graph
    with storage_errors("writing ONNX Runtime's profile"), tempfile.TemporaryDirectory(prefix="edgemix-") as folder:
        session = open_session(path, provider, threads=threads, profile=Path(folder) / "calls")
        try:
            member = DecoderGraph(session, entry.config, provider, entry.name)
            tokens = [np.asarray(prompt[: member.chunk], np.int64)]
            for _ in range(PREFILLS):
                cache = member.new_cache()
                member.extend(cache, tokens)
            for _ in range(DECODES):
                member.extend(cache, [tokens[0][:1]])
            cache.free()
        finally:
            trace = Path(session.end_profiling())  # before the folder goes
        calls = read_calls(trace.read_bytes())
    if len(calls) != PREFILLS + DECODES:
        raise EdgemixError(f"ONNX Runtime's profiler recorded {len(calls)} calls of {PREFILLS + DECODES}")
    return len(tokens[0]), calls[1:PREFILLS], calls[PREFILLS + 1 :]


def read_calls(trace: bytes) -> list[Call]:
    """Read the calls in a file of the profiler.

    Raises:
        EdgemixError: It is not such a file.
    """
    try:
        events = msgspec.json.decode(trace, type=list[_Event])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise EdgemixError(f"ONNX Runtime's profile cannot be read: {error}") from None
    nodes = sorted((e for e in events if e.cat == "Node" and e.name.endswith(_KERNEL)), key=lambda event: event.ts)
    runs = sorted((e for e in events if e.cat == "Session" and e.name == "model_run"), key=lambda event: event.ts)
    starts = [event.ts for event in nodes]
    calls = []
    for run in runs:
        first, last = np.searchsorted(starts, [run.ts, run.ts + run.dur + 1])
        kernels = tuple(
            Kernel(
                str(node.args.get("op_name", "")),
                node.name.removesuffix(_KERNEL),
                (node.ts - run.ts) / 1e6,
                node.dur / 1e6,
            )
            for node in nodes[first:last]
        )
        calls.append(Call(run.dur / 1e6, kernels))
    return calls


def breakdown(
    graph: str, prompt: int, prefills: Sequence[Call], decodes: Sequence[Call], marks: Mapping[str, str]
) -> Breakdown:
    """Break the median call of each kind down by operator type and by part of the model.

    Args:
        graph: Its name.
        prompt: Tokens of a prefill.
        prefills, decodes: Calls; at least one each.
        marks: Name of a node -> its part, see `graphs`.
    """
    prefill, decode = median(prefills), median(decodes)
    types = Counter(kernel.type for kernel in decode.kernels) | Counter(kernel.type for kernel in prefill.kernels)
    by_type = [_sums(call, [kernel.type for kernel in call.kernels]) for call in (prefill, decode)]
    by_part = [_sums(call, parts(call, marks)) for call in (prefill, decode)]
    operators = [Operator(name, count, by_type[0][name], by_type[1][name]) for name, count in types.items()]
    names = sorted(by_part[0].keys() | by_part[1].keys(), key=_place)
    return Breakdown(
        graph=graph,
        prompt=prompt,
        prefill=prefill.seconds,
        decode=decode.seconds,
        operators=tuple(sorted(operators, key=lambda operator: -operator.decode)),
        layers=tuple(LayerTime(name, by_part[0][name], by_part[1][name]) for name in names),
    )


def median(calls: Sequence[Call]) -> Call:
    """Return the call of median time (the faster one of two)."""
    return sorted(calls, key=lambda call: call.seconds)[(len(calls) - 1) // 2]


def parts(call: Call, marks: Mapping[str, str]) -> list[str]:
    """Return the part of the model to which each kernel of a call belongs."""
    return spread(marks.get(kernel.name) or mark_of_name(kernel.name) for kernel in call.kernels)


def _sums(call: Call, keys: Iterable[str]) -> Mapping[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for kernel, key in zip(call.kernels, keys, strict=True):
        sums[key] += kernel.seconds
    return sums


def _place(part: str) -> tuple[int, int]:
    """Return a part's sort key: its place in the model."""
    order = {EMBEDDING: 0, HEAD: 2, OTHER: 3}
    return (order[part], 0) if part in order else (1, int(part.split()[1]))
