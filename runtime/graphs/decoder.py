"""A decoder graph in an ONNX Runtime session: it reads tokens into a key-value cache and returns logits."""

from __future__ import annotations

import copy
import math
import operator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.bundle import graph_io
from edgemix.errors import EXPORT_AGAIN, BundleError, EdgemixError, InputError
from edgemix.runtime.cancellation import check as check_cancelled
from edgemix.runtime.graphs.cuda_graphs import CudaGraph, numbers
from edgemix.runtime.graphs.growing_cache import GrowingCache
from edgemix.runtime.graphs.kv_cache import CacheLayout, KVCache, Slot
from edgemix.runtime.graphs.providers import (
    PROVIDERS,
    check_version,
    exclusive,
    onnxruntime_errors,
    open_session,
    place,
    plain,
    run_options,
)
from edgemix.runtime.graphs.shared_cache import SharedCache
from edgemix.runtime.token_progress import report_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.runtime.graphs.prepacked_weights import PrepackedWeights
    from edgemix.runtime.graphs.providers import Provider

    Tokens = Sequence[Sequence[int]] | Sequence[NDArray[np.int64]] | NDArray[np.int64]
    Watch = Callable[[str, int], AbstractContextManager[object]]

MAX_CHUNK = 256
"""Most tokens read in one call."""
FEW = 32
"""Most rows times tokens of a call while decoding, drafts included; larger calls read prompts."""
LOGITS_BYTES = 64 << 20
"""Approximate bound of the logits that one call returns, in bytes."""
ATTENTION = (1, 32)
"""First version of ONNX Runtime whose GroupQueryAttention supports all that graphs use: keys and values in 8 bits, and
several tokens of several sequences.
"""
MAX_STATE = 1 << 22
"""Most numbers that all layers may keep for a token, each the same part; of GPT-3 it would be 2.4 million."""

_CACHES: dict[str, type[KVCache]] = {"shared": SharedCache, "growing": GrowingCache}
_FLOATS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_CACHE_TYPES = _FLOATS | {"tensor(int8)": np.dtype(np.int8)}


_NOBODY = nullcontext()


def _unwatched(name: str, tokens: int) -> AbstractContextManager[object]:  # noqa: ARG001
    return _NOBODY


@dataclass(slots=True)
class _Call:
    """A call's binding for ids [batch, new].

    Attributes:
        binding: ONNX Runtime's binding.
        logits: The buffer [batch, kept, vocabulary] or [batch, kept, members, vocabulary] that logits are written to.
        new: Tokens per row.
        kept: The OrtValue that tells the graph how many logits to compute.
        again: Whether it has run before.
        captured: The recorded CUDA graph, where the provider records calls.
    """

    binding: Any
    logits: NDArray[Any]
    new: int
    kept: Any
    again: bool = False
    captured: CudaGraph | None = None


class DecoderGraph:
    """A loaded decoder graph of one member, or of several members that share their base's weights.

    It holds no state between calls: several threads may use one graph at once, each with its own cache. Logits of
    several members end with the axes [members, vocabulary] in the place of [vocabulary]; `parts` separates them.

    Attributes:
        config: The graph's config in the manifest.
        member_count: Number of members in the graph.
        vocabulary: Width of the logits, padding included.
        tokens: int64 [vocabulary], the ids that its logits are of, ascending; None where those are 0, 1, 2, ...
        context: Most tokens that a sequence can have.
        layout: The shapes of its caches.
        chunk: Most tokens that one call should read, so that its logits stay within `LOGITS_BYTES`.
    """

    def __init__(
        self,
        session: Any,
        config: GraphConfig,
        provider: Provider,
        name: str,
        *,
        tokens: NDArray[np.int64] | None = None,
    ) -> None:
        self.config, self.provider, self.name, self.tokens = config, provider, name, tokens
        self._session = session
        self._watch: Watch = _unwatched
        self._numbers = numbers()
        self._inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        self._outputs = {tensor.name: tensor for tensor in session.get_outputs()}
        self._can_keep = any(t.name == graph_io.LOGITS_TO_KEEP for t in session.get_overridable_initializers())
        self._check()
        logits = self._outputs[graph_io.LOGITS]
        self._logits_dtype = _FLOATS[logits.type]
        self.vocabulary: int = logits.shape[-1]
        self.context = config.context
        self.member_count = config.member_count
        self.chunk = int(np.clip(LOGITS_BYTES // (4 * self.vocabulary * self.member_count), 16, MAX_CHUNK))
        slots = tuple(
            Slot(tensor.name, graph_io.present_of(tensor.name), self.member_count * tensor.shape[1], tensor.shape[3])
            for tensor in self._inputs.values()
            if tensor.name.startswith(graph_io.PAST_PREFIX)
        )
        dtype = _CACHE_TYPES[self._inputs[graph_io.past_key(0)].type]
        self.layout = CacheLayout(slots, dtype, provider, config.context, self.member_count)

    @classmethod
    def load(
        cls,
        graph: Path,
        config: GraphConfig,
        provider: Provider | None = None,
        threads: int | None = None,
        *,
        name: str = "",
        packed: tuple[PrepackedWeights, str] | None = None,
        tokens: NDArray[np.int64] | None = None,
    ) -> DecoderGraph:
        """Load a graph.

        Args:
            graph: The .onnx file.
            config: As the exporter wrote them.
            provider: Where it runs; the CPU by default.
            threads: Threads within an operator; physical cores by default.
            name: For messages; the graph's folder by default.
            packed: See `open_session`.
            tokens: The ids that its logits are of; all by default.

        Raises:
            BundleError: The graph does not load, or is not the decoder that `config` describe.
            EdgemixError: ONNX Runtime is too old for its attention.
        """
        provider = provider or PROVIDERS["cpu"]
        if config.cache == "shared":
            check_version(ATTENTION, "this graph's attention")
        session = open_session(graph, provider, threads=threads, packed=packed)
        try:
            return cls(session, config, provider, name or graph.parent.name, tokens=tokens)
        except onnxruntime_errors() as error:
            raise BundleError(f"ONNX Runtime cannot describe {graph}: {plain(error)}", EXPORT_AGAIN) from error

    def watched(self, watch: Watch) -> DecoderGraph:
        """Return the same graph, whose every call of ONNX Runtime is made within `watch(name, tokens)`."""
        member = copy.copy(self)
        member._watch = watch
        return member

    def new_cache(self, batch: int = 1) -> KVCache:
        """Return an empty cache for `batch` sequences; it takes memory only as tokens are read."""
        return _CACHES[self.config.cache](self.layout, batch)

    def extend(self, cache: KVCache, tokens: Tokens) -> NDArray[np.float32]:
        """Read new tokens, and return the logits after each row's last one.

        Args:
            cache: The state to continue; it is updated.
            tokens: For each row at least one token id; rows may differ in number.

        Returns:
            Logits float32 [batch, vocabulary]. They lie in the cache's buffer: the next call overwrites them.

        Raises:
            InputError: A sequence would become longer than the context.
            EdgemixError: ONNX Runtime fails (most often for want of memory).
        """
        rows = self._rows(tokens, cache)
        counts = [len(row) for row in rows]
        if not cache.reads_together(counts):
            parts = cache.split(counts)
            logits = [self.extend(part, [row]) for part, row in zip(parts, rows, strict=True)]
            cache.join(parts)
            return np.concatenate(logits)
        together = _stacked(rows)
        step = max(1, self.chunk // cache.batch)
        for start in range(0, together.shape[1], step):
            last = self._run(cache, together[:, start : start + step], keep=1)[:, -1]
        return last.astype(np.float32, copy=False)

    def extend_all(self, cache: KVCache, tokens: Tokens) -> list[NDArray[np.float32]]:
        """Read new tokens, and return the logits after every one of them.

        The caller bounds the memory: rows of at most `chunk` tokens keep to `LOGITS_BYTES` a row.

        Returns:
            For each row, logits float32 [its tokens, vocabulary]. They lie in a buffer that the next call overwrites.

        Raises:
            InputError, EdgemixError: As `extend`.
        """
        rows = self._rows(tokens, cache)
        if cache.reads_together(counts := [len(row) for row in rows]):
            return list(self._run(cache, _stacked(rows)).astype(np.float32, copy=False))
        parts = cache.split(counts)
        logits = [self.extend_all(part, [row])[0] for part, row in zip(parts, rows, strict=True)]
        cache.join(parts)
        return logits

    def forward(self, tokens: Tokens) -> list[NDArray[np.float32]]:
        """Run the graph on whole sequences, padded on the right to equal length, without a past.

        Returns:
            For each row, logits float32 [its tokens, vocabulary].
        """
        cache = self.new_cache(len(tokens))
        rows = self._rows(tokens, cache)
        counts = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), counts.max()), np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = row
        mask = (np.arange(counts.max()) < counts[:, None]).astype(np.int64)
        logits = self._run(cache, ids, mask).astype(np.float32, copy=False)
        return [row[:count] for row, count in zip(logits, counts, strict=True)]

    def parts(self, logits: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return each member's logits [..., vocabulary]."""
        return [logits] if self.member_count == 1 else [logits[..., member, :] for member in range(self.member_count)]

    def _run(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None = None,
        *,
        keep: int | None = None,
    ) -> NDArray[Any]:
        """Run the graph on ids [batch, new]: logits [batch, new, vocabulary], which the next call overwrites.

        With `keep`, only the logits of the last `keep` tokens may be present.
        """
        batch, new = ids.shape
        kept = min(keep, new) if keep and self._can_keep else new
        check_cancelled()
        try:
            with exclusive(self.provider):
                cache.reserve(new)
                call = self.prepare_call(cache, batch, new, kept)
                options = self._feed(cache, call, ids, mask)
                with self._watch(self.name, ids.size):
                    self._session.run_with_iobinding(call.binding, options)
                if call.captured is not None:
                    call.captured.read(call.logits)
        except onnxruntime_errors() as error:
            raise EdgemixError(f"member {self.name!r} failed on {self.provider.name}: {plain(error)}") from error
        cache.advance(call.binding, new)
        report_tokens(ids.size)
        return call.logits

    def _feed(self, cache: KVCache, call: _Call, ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> Any:
        """Bind a call's inputs, and return the options that it runs with."""
        new, captures = ids.shape[1], self.provider.captures
        inputs = {
            graph_io.INPUT_IDS: np.ascontiguousarray(ids),
            graph_io.ATTENTION_MASK: cache.mask(new) if mask is None else mask,
        }
        if graph_io.POSITION_IDS in self._inputs:
            inputs[graph_io.POSITION_IDS] = cache.lengths[:, None] + np.arange(new)
        # A first call is not recorded: it may be the only one of its shape.
        if captures and call.captured is None and call.again and mask is None and ids.size <= FEW:
            self._capture(cache, call, inputs)
        call.again = True
        if call.captured is None:
            # Bound again each time: a provider with memory of its own copies them when they are bound.
            for name, values in inputs.items():
                call.binding.bind_cpu_input(name, values)
            return run_options(-1) if captures else None
        for name, values in inputs.items():
            call.captured.write(name, values)
        return call.captured.options

    def _capture(self, cache: KVCache, call: _Call, inputs: Mapping[str, NDArray[np.int64]]) -> None:
        """Record calls of this shape from now on, where the cache stays in place and a recording is left."""
        if isinstance(cache, SharedCache) and (number := next(self._numbers, None)) is not None:
            shapes = {name: values.shape for name, values in inputs.items()}
            shapes[graph_io.ATTENTION_MASK] = (cache.batch, cache.widest(call.new))
            call.captured = CudaGraph(call.binding, self.provider, shapes, call.logits, number)

    def prepare_call(self, cache: KVCache, batch: int, new: int, kept: int) -> _Call:
        """Return the binding for a call of this size. All bindings of small calls are kept, with one buffer; of large
        calls only the last one.
        """
        few, key = batch * new <= FEW, (batch, new, kept)
        call: _Call | None = cache.calls.get(key)
        if call is None:
            shape = (batch, kept, *(() if self.member_count == 1 else (self.member_count,)), self.vocabulary)
            size = math.prod(shape)
            if few:
                most = FEW * self.member_count * self.vocabulary  # memory that is never touched is never allocated
                logits = cache.calls.setdefault(None, np.empty(most, self._logits_dtype))[:size].reshape(shape)
            else:
                logits = np.empty(shape, self._logits_dtype)
                for other in [each for each in cache.calls if each is not None and each[0] * each[1] > FEW]:
                    del cache.calls[other]
            call = self._new_call(logits, new, kept)
            cache.bind(call.binding)
            if cache.keeps_bindings:
                cache.calls[key] = call
        return call

    def _new_call(self, logits: NDArray[Any], new: int, kept: int) -> _Call:
        binding = self._session.io_binding()
        binding.bind_output(graph_io.LOGITS, "cpu", 0, logits.dtype, list(logits.shape), logits.ctypes.data)
        number = place(np.array([kept], np.int64), PROVIDERS["cpu"])
        if self._can_keep:  # bound by value: ONNX Runtime does not find optional inputs by array
            binding.bind_ortvalue_input(graph_io.LOGITS_TO_KEEP, number)
        return _Call(binding, logits, new, number)

    def _rows(self, tokens: Tokens, cache: KVCache) -> list[NDArray[np.int64]]:
        """Return the new tokens as arrays, after checking that the cache can take them."""
        rows = [np.asarray(row, np.int64) for row in tokens]
        counts = [len(row) for row in rows]
        if len(rows) != cache.batch or not all(counts):
            raise ValueError(f"{cache.batch} rows of at least one token are needed, not {counts}")
        longest = max(map(operator.add, cache.lengths.tolist(), counts))
        if longest > self.context:
            raise InputError(
                f"{longest} tokens are more than the context of {self.name!r}, {self.context} tokens",
                "Shorten the text.",
            )
        return rows

    def _check(self) -> None:
        """Refuse a graph that is not what `graph_io` and the config say, before anything is sized by it."""
        kind = graph_io.GRAPH_TENSORS["decoder"]
        pasts = kind.past_inputs(self.config.layers)
        inputs, outputs = kind.inputs | pasts, kind.outputs | {*map(graph_io.present_of, pasts)}
        problems = [
            *(f"it has no input {name}" for name in sorted(inputs - self._inputs.keys())),
            *(f"its input {name} is unknown" for name in sorted(self._inputs.keys() - inputs - kind.optional_inputs)),
            *(f"it has no output {name}" for name in sorted(outputs - self._outputs.keys())),
        ]
        if not problems:
            problems = [*self._misshapen(pasts)]
        if problems:
            raise BundleError(
                f"the graph of member {self.name!r} is not the decoder that it should be: {'; '.join(problems)}",
                "Export the bundle again.",
            )

    def _misshapen(self, pasts: Iterable[str]) -> Iterable[str]:
        logits, member_count = self._outputs[graph_io.LOGITS], self.config.member_count
        said = (self.config.vocabulary,) if member_count == 1 else (member_count, self.config.vocabulary)
        if len(logits.shape) != 2 + len(said) or tuple(logits.shape[2:]) != said:
            known = "vocabulary" if member_count == 1 else f"{member_count} members, vocabulary"
            yield f"its logits are {logits.shape}, the manifest says {known} {self.config.vocabulary}"
        if logits.type not in _FLOATS:
            yield f"its logits are {logits.type}"
        for tensor in (self._inputs[name] for name in pasts):
            axes = tensor.shape
            if len(axes) != 4 or not isinstance(axes[1], int) or not isinstance(axes[3], int):
                yield f"{tensor.name} is {axes}, not [batch, heads, past, head_size]"
            elif not 0 < axes[1] * axes[3] <= MAX_STATE // self.config.layers // 2:
                yield f"{tensor.name} has {axes[1]} heads of size {axes[3]}"
            said_type = self.config.cache_dtype or self.config.dtype
            if tensor.type != f"tensor({said_type.removesuffix('32')})":
                yield f"{tensor.name} is {tensor.type}, the manifest says {said_type}"


def _stacked(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return rows of equal length as one array [rows, tokens]; a view for a single row."""
    return rows[0][None] if len(rows) == 1 else np.stack(rows)
