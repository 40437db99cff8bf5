"""Compare a stored graph, as the runtime runs it, with the fp32 graph that it was made from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgemix.bundle.manifest import QuantizationParity
from edgemix.export.parity.limits import TOP1_MARGIN
from edgemix.formats import FORMAT_SPECS
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.mixing.arithmetic import log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.formats import Format
    from edgemix.runtime.graphs.kv_cache import KVCache

    Tokens = NDArray[np.int64]

_LENGTH = 96

_ENOUGH_TOKENS = 512

_MOST_TOKENS = 2048

_SAMPLED_ROWS = 8

_DECODED, _DECODED_TEXTS = 128, 8
"""Positions to decode at, and the most texts they lie in: enough for a mean KL, not for argmax counts."""


def check_quantized(
    fp32_path: Path,
    path: Path,
    config: GraphConfig,
    windows: Sequence[Sequence[int]] | None,
    *,
    format: Format,  # noqa: A002 - the recipe's word
    member: int = 0,
    seed: int = 0,
    observe: Callable[[Tokens, int, NDArray[np.float32]], None] | None = None,
    progress: Progress = NO_PROGRESS,
) -> QuantizationParity:
    """Compare a stored graph with its fp32 graph, on whole texts and on single tokens after a past.

    Both are measured because quantized products of one row have other kernels. The fp32 graph reads each text once.

    Args:
        fp32_path: The fp32 graph.
        path: The stored graph.
        config: The stored graph's; the fp32 graph's differs in the dtype and computes one member only.
        windows: Texts as token ids. About 2,048 tokens of them are used, taken evenly. Fewer than 512 are filled up
            with texts sampled from the fp32 graph at temperature 1, so that recipes without data are checked, too.
        format: The format, whose limits apply.
        member: Index of the member within the stored graph.
        seed: Seed of the sampled texts.
        observe: Called with a text, a position, and the fp32 graph's log-probabilities from there [tokens, vocabulary].
        progress: Progress callback.
    """
    source = DecoderGraph.load(
        fp32_path, msgspec.structs.replace(config, dtype="float32", member_count=1, cache_dtype=None)
    )
    stored = DecoderGraph.load(path, config)
    texts = _texts(source, windows or (), seed)
    prefill, decode = Distance(), Distance()
    stride = -(-len(texts) // _DECODED_TEXTS)
    steps = _DECODED // len(texts[::stride])
    with progress.stage("parity", total=sum(len(text) - 1 for text in texts)) as task:
        for number, text in enumerate(texts):
            span = _decoded_positions(text, 0 if number % stride else steps, source.chunk)
            cache, exact = stored.new_cache(), []
            for start, p, q, targets in _log_probability_pairs(source, stored, member, text, cache):
                prefill.add(p, q, targets)
                if observe is not None:
                    observe(text, start, p)
                exact.append(p[max(span.start - start, 0) : max(span.stop - start, 0)].copy())
                task.advance(len(p))
            if span.start < span.stop:
                q = _decoded(stored, member, cache, text, span)
                decode.add(np.concatenate(exact), q, text[span.start + 1 : span.stop + 1])
    limits = FORMAT_SPECS[format].limits
    return QuantizationParity(
        tokens=prefill.tokens,
        kl=prefill.kl,
        kl_limit=limits.kl,
        top1_disagreement=prefill.top1_disagreement,
        top1_disagreement_limit=limits.top1_disagreement,
        perplexity_ratio=prefill.perplexity_ratio,
        perplexity_ratio_limit=limits.perplexity_ratio,
        decode_kl=decode.kl if decode.tokens else None,
    )


class Distance:
    """The distance of distributions q from distributions p, accumulated over positions.

    Attributes:
        tokens: Number of positions so far.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = self._surprise = 0.0
        self._top1_disagreements = 0

    def add(self, p: NDArray[np.float32], q: NDArray[np.float32], targets: Tokens) -> None:
        """Add log-probabilities float32 [tokens, vocabulary] of both, and the tokens that followed, int64 [tokens]."""
        rows = np.arange(len(p))
        self.tokens += len(p)
        self._kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        margin = p.max(axis=1) - p[rows, q.argmax(axis=1)]
        self._top1_disagreements += int((margin > TOP1_MARGIN).sum())
        self._surprise += float((p - q)[rows, targets].sum(dtype=np.float64))

    @property
    def kl(self) -> float:
        """Mean KL(p || q) in nats per token."""
        return self._kl / self.tokens

    @property
    def top1_disagreement(self) -> float:
        """Share of positions at which p prefers its own most probable token to q's by more than `TOP1_MARGIN`."""
        return self._top1_disagreements / self.tokens

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of q over that of p, on the tokens that followed."""
        return math.exp(min(self._surprise / self.tokens, 700.0))


def sample_texts(
    path: Path, config: GraphConfig, tokens: int, *, seed: int = 0, vocabulary: int | None = None
) -> list[list[int]]:
    """Sample at least `tokens` tokens of text from an fp32 graph, with ids below `vocabulary` if it is given."""
    source = DecoderGraph.load(path, msgspec.structs.replace(config, dtype="float32"))
    return [text.tolist() for text in _sample(source, tokens, seed, vocabulary)]


def _texts(source: DecoderGraph, windows: Sequence[Sequence[int]], seed: int) -> list[Tokens]:
    """Return `_ENOUGH_TOKENS` to about `_MOST_TOKENS` token ids to measure on, no text longer than the context."""
    texts = [np.asarray(window[: source.context], np.int64) for window in windows if len(window) > 1]
    tokens = sum(map(len, texts))
    if tokens < _ENOUGH_TOKENS:
        return texts + _sample(source, _ENOUGH_TOKENS - tokens, seed)
    stride = max(1, tokens // _MOST_TOKENS)
    return texts[::stride]


def _sample(source: DecoderGraph, tokens: int, seed: int, vocabulary: int | None = None) -> list[Tokens]:
    """Sample at least `tokens` tokens from a graph, as `_SAMPLED_ROWS` texts."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, vocabulary or source.vocabulary, (_SAMPLED_ROWS, 1))
    cache = source.new_cache(_SAMPLED_ROWS)
    for _ in range(min(source.context, tokens // _SAMPLED_ROWS + 2) - 1):
        log_probabilities = log_softmax(source.extend(cache, rows[:, -1:])[:, :vocabulary])
        noise = generator.gumbel(size=log_probabilities.shape)  # the largest of log p + Gumbel noise is a draw from p
        rows = np.concatenate([rows, (log_probabilities + noise).argmax(axis=1)[:, None]], axis=1)
    return list(rows)


def _log_probability_pairs(
    source: DecoderGraph, stored: DecoderGraph, member: int, text: Tokens, cache: KVCache
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32], Tokens]]:
    """Yield the start of each chunk, both graphs' log-probabilities float32 [tokens, vocabulary] and the next tokens.

    The stored graph reads the text into `cache`.
    """
    source_cache = source.new_cache()
    for start in range(0, len(text) - 1, source.chunk):
        piece = text[start : start + source.chunk][: len(text) - 1 - start]
        p = log_softmax(source.extend_all(source_cache, piece[None])[0])
        q = log_softmax(stored.parts(stored.extend_all(cache, piece[None])[0])[member])
        yield start, p, q, text[start + 1 : start + 1 + len(piece)]


def _decoded_positions(text: Tokens, steps: int, chunk: int) -> slice:
    """Return up to `steps` positions that are decoded: the last ones, with a successor, of a text's first tokens."""
    steps = max(0, min(steps, len(text) - 2, chunk))
    end = min(len(text), _LENGTH + steps + 1) - 1
    return slice(end - steps, end)


def _decoded(stored: DecoderGraph, member: int, cache: KVCache, text: Tokens, span: slice) -> NDArray[np.float32]:
    """Return log-probabilities float32 [tokens, vocabulary] of a span that the stored graph reads one token a call.

    What `cache` holds of the text before the span is the past.
    """
    cache.rollback([span.start])
    return np.concatenate([
        log_softmax(stored.parts(stored.extend(cache, text[None, at : at + 1]))[member])
        for at in range(span.start, span.stop)
    ])  # fmt: skip
