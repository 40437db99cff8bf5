"""The gate: how far a graph may be from its source, measured on the graph as the runtime runs it.

Two comparisons, and the only table of tolerances. A traced or rebuilt graph must be the torch model but for rounding
(`check_graph`); a quantised graph must stay as close to the fp32 graph as its format can be expected to (`LIMITS`,
`check_quantized`). `enforce` turns figures over their limit into an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from edgemix.bundle.manifest import GraphParity, PruningFigures, QuantizationParity
from edgemix.errors import ParityError
from edgemix.export.models.architecture import sliding_windows
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.mixing.arithmetic import log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from edgemix.bundle.graph_io import GraphConfig
    from edgemix.formats import Format

    Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """How far a format may go from fp32: mean KL divergence (nats a token), top-1 disagreement, perplexity ratio."""

    kl: float
    top1_disagreement: float
    perplexity_ratio: float


LIMITS: dict[Format, Limits] = {
    "fp32": Limits(kl=1e-6, top1_disagreement=0.001, perplexity_ratio=1.001),
    "fp16": Limits(kl=1e-3, top1_disagreement=0.01, perplexity_ratio=1.01),
    "int8": Limits(kl=0.02, top1_disagreement=0.05, perplexity_ratio=1.03),
    "int8-dynamic": Limits(kl=0.05, top1_disagreement=0.1, perplexity_ratio=1.05),
    "int4": Limits(kl=0.45, top1_disagreement=0.35, perplexity_ratio=1.5),
    "nf4": Limits(kl=0.45, top1_disagreement=0.35, perplexity_ratio=1.5),
}
"""Set by SmolLM2-135M: small, and so hard to quantise. Worst of WikiText-2 and Python it has: int8 0.004, 0.015, 1.01;
int4 0.29, 0.26, 1.27, nf4 a bit less; int8-dynamic 1.01 with its outliers treated, and otherwise, which must not pass,
0.28, 0.23, 1.25. Text that the graph writes itself gives figures about a third higher: the rest of the
room is for that."""


@dataclass(frozen=True)
class PruningLimits:
    """How far a pruned model may go from the whole one: mean KL divergence (nats a token), perplexity ratio."""

    kl: float
    perplexity_ratio: float


PRUNING_LIMITS = PruningLimits(kl=0.5, perplexity_ratio=1.5)

GRAPH_TOLERANCE = 1e-4
"""Largest difference of log-probabilities (nats) between torch and a graph, where the torch model itself is stable."""

NOISE = 1e-6
"""Relative change of the embeddings, about what rounding adds up to in a deep model, that shows where it is not."""

NOISE_ROOM = 5
"""How many times the change that `NOISE` makes a position may differ. Of SmolLM2-135M's graphs no position differs by
more than 2.1 times; single positions, with huge activations in them, by up to 4e-3 nats, most by 4e-5."""

CHECKED_WINDOW = 1024
"""Sliding windows up to this length are crossed by `check_graph`'s sequence; longer ones would take it minutes."""

FLIP_MARGIN = 0.1
"""A near tie decided the other way is no flip: the fp32 graph must prefer its token by more than this, in nats."""

_LENGTH = 96
_BATCH_LENGTH = 64
_STEPS = 3
_ENOUGH_TOKENS = 512
_MOST_TOKENS = 2048
_SAMPLED_ROWS = 8
_DECODED, _DECODED_TEXTS = 128, 8
"""Positions at which the gate decodes, and the most texts they lie in: enough for a mean KL, not for argmax counts."""


def check_graph(model: PreTrainedModel, path: Path, config: GraphConfig) -> GraphParity:
    """Compare a graph with the torch model on random tokens: each sequence alone and uncached in torch, against the
    graph's prefill, its decoding of one and of several tokens after a past, and a batch of unequal lengths.

    The sequence is longer than the model's sliding windows, up to `CHECKED_WINDOW`. Where the model is unstable, so
    that no two ways to compute it agree, a difference counts in units of what a position may differ by (`NOISE_ROOM`).
    """
    windows = [window for window in sliding_windows(model.config) if window and window <= CHECKED_WINDOW]
    longest = min(config.context, max(_LENGTH, *(window + 16 for window in windows), 0))
    rows = _random_rows((longest, longest // 2, _STEPS + 2), model.config.get_text_config().vocab_size)
    expected = [_reference(model, row) for row in rows]
    member = DecoderGraph.load(path, config, name=config.exporter)
    return GraphParity(
        prefill=_worst([_difference(expected[0], member.forward(rows[:1])[0])]),
        decode=_worst(_decode_differences(member, rows[0], expected[0])),
        padded_batch=_worst(_batch_differences(member, rows, expected)),
        limit=GRAPH_TOLERANCE,
    )


def check_quantized(
    fp32_path: Path,
    path: Path,
    config: GraphConfig,
    windows: Sequence[Sequence[int]] | None,
    *,
    format: Format,  # noqa: A002 - the recipe's word
    voice: int = 0,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> QuantizationParity:
    """Compare a stored graph with the fp32 graph that it was made from, where it reads whole texts, and where it reads
    a token after a past: quantised products of one row have kernels of their own.

    Args:
        fp32_path: The fp32 graph.
        path: The stored graph.
        config: Of the stored graph; the fp32 graph differs from it in the dtype, and speaks for one member only.
        windows: Texts as token ids. Of many, some are taken evenly from all, about 2,048 tokens; to fewer than 512
            tokens are added texts that the fp32 graph itself writes (sampled at temperature 1 after random first
            tokens), so that a recipe without data has a gate too.
        format: The row of `LIMITS` to hold it against.
        voice: Which of the stored graph's members the fp32 graph is.
        seed: Of the texts that the fp32 graph writes.
        progress: Told of every piece of text read.
    """
    source = DecoderGraph.load(
        fp32_path, msgspec.structs.replace(config, dtype="float32", member_count=1, cache_dtype=None)
    )
    stored = DecoderGraph.load(path, config)
    texts = _texts(source, windows or (), seed)
    prefill, decode = Distance(), Distance()
    with progress.stage("parity", total=sum(len(text) - 1 for text in texts)) as task:
        for text in texts:
            for p, q, targets in _log_probability_pairs(source, stored, voice, text):
                prefill.add(p, q, targets)
                task.advance(len(p))
        some = texts[:: -(-len(texts) // _DECODED_TEXTS)]
        for text in some:
            for p, q, targets in _decoded_pairs(source, stored, voice, text, _DECODED // len(some)):
                decode.add(p, q, targets)
    limits = LIMITS[format]
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
    """How far distributions q are from distributions p, summed up as they come.

    Attributes:
        tokens: Number of positions so far.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = self._surprise = 0.0
        self._top1_disagreements = 0

    def add(self, p: NDArray[np.float32], q: NDArray[np.float32], targets: Tokens) -> None:
        """Take in log-probabilities [tokens, vocabulary] of both, and the tokens that came next."""
        rows = np.arange(len(p))
        self.tokens += len(p)
        self._kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        margin = p.max(axis=1) - p[rows, q.argmax(axis=1)]
        self._top1_disagreements += int((margin > FLIP_MARGIN).sum())
        self._surprise += float((p - q)[rows, targets].sum(dtype=np.float64))

    @property
    def kl(self) -> float:
        """Mean KL(p || q), nats a token."""
        return self._kl / self.tokens

    @property
    def top1_disagreement(self) -> float:
        """Share of positions at which p prefers its own most probable token to q's by more than `FLIP_MARGIN`."""
        return self._top1_disagreements / self.tokens

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of q over that of p, on the tokens that came next."""
        return math.exp(min(self._surprise / self.tokens, 700.0))


def enforce(
    figures: GraphParity | QuantizationParity | PruningFigures, *, forced: bool = False, member: str = ""
) -> bool:
    """Stop where figures are over their limits.

    Args:
        figures: As measured.
        forced: The user wants the graph whatever its figures are.
        member: The member's name, for the message.

    Returns:
        True if figures are over a limit and `forced` let them pass.

    Raises:
        ParityError: Figures are over a limit and not `forced`, or no numbers at all.
    """
    if isinstance(figures, GraphParity):
        limits = dict.fromkeys(("prefill", "decode", "padded_batch"), figures.limit)
        what, remedy = "differs from the torch model in log-probabilities", "Keep it as it is with --force."
    elif isinstance(figures, PruningFigures):
        limits = {name: getattr(figures, f"{name}_limit") for name in ("kl", "perplexity_ratio")}
        what = f"is too far from the model before pruning on {figures.tokens} tokens"
        remedy = "Prune less, let it recover longer (recover: MINUTES), or keep it as it is with --force."
    else:
        limits = {name: getattr(figures, f"{name}_limit") for name in ("kl", "top1_disagreement", "perplexity_ratio")}
        if figures.decode_kl is not None:
            limits["decode_kl"] = figures.kl_limit
        what = f"is too far from the fp32 graph on {figures.tokens} tokens"
        remedy = "Choose a format with more bits for it, or keep it as it is with --force."
    values = {name: getattr(figures, name) for name in limits}
    if all(values[name] <= limits[name] for name in limits):
        return False
    if forced and all(map(math.isfinite, values.values())):
        return True
    table = ", ".join(f"{name.replace('_', ' ')} {values[name]:.2g} (limit {limits[name]:.2g})" for name in limits)
    raise ParityError(f"the graph {f'of member {member!r} ' if member else ''}{what}: {table}", remedy)


def within(figures: GraphParity | QuantizationParity | PruningFigures) -> bool:
    """Whether figures are within their limits."""
    try:
        return not enforce(figures)
    except ParityError:
        return False


def _random_rows(lengths: Sequence[int], vocabulary: int) -> list[Tokens]:
    """Token ids spread over the vocabulary, the same at every call."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length) for length in lengths]


@dataclass(frozen=True)
class _Reference:
    """What torch says to one sequence.

    Attributes:
        logits: float32 [tokens, vocabulary].
        units: float64 [tokens], how many times `GRAPH_TOLERANCE` each position may differ, at least 1.
    """

    logits: torch.Tensor
    units: torch.Tensor

    def __getitem__(self, part: slice) -> _Reference:
        return _Reference(self.logits[part], self.units[part])


def _reference(model: PreTrainedModel, row: Tokens) -> _Reference:
    """The torch model's word on one sequence, read whole and without a cache."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator))

    logits = _logits(model, row)
    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        noise = torch.stack([_differences(logits, _logits(model, row)) for _ in range(2)]).amax(0)
    finally:
        handle.remove()
    return _Reference(logits, (noise * NOISE_ROOM / GRAPH_TOLERANCE).clamp(min=1))


def _logits(model: PreTrainedModel, row: Tokens) -> torch.Tensor:
    ids = torch.from_numpy(row)[None]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0]


def _decode_differences(member: DecoderGraph, row: Tokens, expected: _Reference) -> Iterator[float]:
    """One token after a past, then the rest of the row, several at once."""
    cache = member.new_cache()
    past = len(row) - _LENGTH // 8
    member.extend(cache, row[None, :past])
    for start, end in ((past, past + 1), (past + 1, len(row))):
        yield _difference(expected[start:end], member.extend_all(cache, row[None, start:end])[0])


def _batch_differences(member: DecoderGraph, rows: list[Tokens], expected: list[_Reference]) -> Iterator[float]:
    """Rows of unequal length: in one call, padded on the right; and from a cache, token by token."""
    beginnings = [row[:_BATCH_LENGTH] for row in rows]
    for logits, wanted in zip(member.forward(beginnings), expected, strict=True):
        yield _difference(wanted[: len(logits)], logits)
    cache = member.new_cache(len(rows))
    member.extend(cache, [row[:-_STEPS] for row in rows])
    for step in range(-_STEPS, 0):
        logits = member.extend(cache, [row[step, None] for row in rows])
        for row_logits, wanted in zip(logits, expected, strict=True):
            yield _difference(wanted[step : step + 1 or None], row_logits[None])


def _difference(expected: _Reference, logits: NDArray[np.float32]) -> float:
    """Largest difference of log-probabilities in its position's unit, NaN if there is one."""
    return float((_differences(expected.logits, torch.from_numpy(logits)) / expected.units).max())


def _differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest difference of log-probabilities at each position: float64 [tokens], a NaN stays one."""
    pairs = zip(a.split(_LENGTH), b.split(_LENGTH), strict=True)
    return torch.cat([(_log_probabilities(x) - _log_probabilities(y)).abs().amax(-1) for x, y in pairs])


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _worst(differences: Iterable[float]) -> float:
    """The largest; unlike Python's max, a NaN anywhere is the result."""
    return float(np.max(list(differences)))


def own_texts(
    path: Path, config: GraphConfig, tokens: int, *, seed: int = 0, vocabulary: int | None = None
) -> list[list[int]]:
    """At least `tokens` tokens of text that an fp32 graph writes itself, for a recipe without text. With ids below a
    `vocabulary` that others share, they can read it.
    """
    source = DecoderGraph.load(path, msgspec.structs.replace(config, dtype="float32"))
    return [text.tolist() for text in _sample(source, tokens, seed, vocabulary)]


def _texts(source: DecoderGraph, windows: Sequence[Sequence[int]], seed: int) -> list[Tokens]:
    """Token ids to measure on: at least `_ENOUGH_TOKENS` and about `_MOST_TOKENS`, no text longer than the context."""
    texts = [np.asarray(window[: source.context], np.int64) for window in windows if len(window) > 1]
    tokens = sum(map(len, texts))
    if tokens < _ENOUGH_TOKENS:
        return texts + _sample(source, _ENOUGH_TOKENS - tokens, seed)
    stride = max(1, tokens // _MOST_TOKENS)
    return texts[::stride]


def _sample(source: DecoderGraph, tokens: int, seed: int, vocabulary: int | None = None) -> list[Tokens]:
    """At least `tokens` tokens in `_SAMPLED_ROWS` texts that the graph writes itself."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, vocabulary or source.vocabulary, (_SAMPLED_ROWS, 1))
    cache = source.new_cache(_SAMPLED_ROWS)
    for _ in range(min(source.context, tokens // _SAMPLED_ROWS + 2) - 1):
        log_probabilities = log_softmax(source.extend(cache, rows[:, -1:])[:, :vocabulary])
        noise = generator.gumbel(size=log_probabilities.shape)  # the largest of log p + Gumbel noise is a draw from p
        rows = np.concatenate([rows, (log_probabilities + noise).argmax(axis=1)[:, None]], axis=1)
    return list(rows)


def _log_probability_pairs(
    source: DecoderGraph, stored: DecoderGraph, voice: int, text: Tokens
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], Tokens]]:
    """Both graphs' log-probabilities float32 [tokens, vocabulary] and the next tokens, a bounded piece at a time."""
    caches = source.new_cache(), stored.new_cache()
    for start in range(0, len(text) - 1, source.chunk):
        piece = text[start : start + source.chunk][: len(text) - 1 - start]
        p = log_softmax(source.extend_all(caches[0], piece[None])[0])
        q = log_softmax(stored.parts(stored.extend_all(caches[1], piece[None])[0])[voice])
        yield p, q, text[start + 1 : start + 1 + len(piece)]


def _decoded_pairs(
    source: DecoderGraph, stored: DecoderGraph, voice: int, text: Tokens, steps: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], Tokens]]:
    """The same at `steps` tokens, fewer of a short text, that the stored graph reads singly after a past."""
    steps = min(steps, len(text) - 2, source.chunk)
    if steps < 1:
        return
    text = text[: _LENGTH + steps + 1]
    past = len(text) - 1 - steps
    caches = source.new_cache(), stored.new_cache()
    for member, cache in zip((source, stored), caches, strict=True):
        member.extend(cache, text[None, :past])
    p = log_softmax(source.extend_all(caches[0], text[None, past:-1])[0])
    q = [
        log_softmax(stored.parts(stored.extend(caches[1], text[None, at : at + 1]))[voice])
        for at in range(past, len(text) - 1)
    ]
    yield p, np.concatenate(q), text[past + 1 :]
