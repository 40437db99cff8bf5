"""How close a member's graphs are: the fp32 graph to torch, the stored graph to the fp32 graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from edgemix.bundle.label_bundle.manifest import EncoderParity, LabelQuantizationParity
from edgemix.errors import ParityError
from edgemix.export.graphs.encoder import encoder_inputs
from edgemix.export.parity.limits import TOP1_MARGIN
from edgemix.formats import FORMAT_SPECS
from edgemix.runtime.mixing.arithmetic import log_softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from edgemix.formats import Format
    from edgemix.runtime.classification.batching import PaddedBatch
    from edgemix.runtime.classification.encoding import EncodedText, TextEncoder
    from edgemix.runtime.graphs.encoder import EncoderGraph


Logits: TypeAlias = "list[NDArray[np.float32]]"
"""Logits of each text: [labels], or [tokens, labels]."""
TOLERANCE = 1e-3
"""Largest difference of log-probabilities (nats) between torch and a graph in fp32."""
TEXTS = 16
"""Texts on which the fp32 graph is compared with torch."""
_BATCH_TOKENS = 2048


def against_torch(
    model: PreTrainedModel, graph: EncoderGraph, encoder: TextEncoder, texts: Sequence[EncodedText]
) -> EncoderParity:
    """Compare a graph with the torch model that it was traced from, on texts one by one and in a padded batch.

    Raises:
        ParityError: It is further from it than `TOLERANCE`.
    """
    names = encoder_inputs(model)
    single, padded = 0.0, 0.0
    together = rows_of(graph, encoder.pad(texts))
    for text, batched in zip(texts, together, strict=True):
        alone = encoder.pad([text])
        feeds = dict(zip(("input_ids", "attention_mask", "token_type_ids"), _arrays(alone), strict=True))
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(feeds[name]) for name in names}).logits[0].float().numpy()
        (own,) = rows_of(graph, alone)
        single = max(single, _difference(logits, own))
        padded = max(padded, _difference(logits, batched))
    found = EncoderParity(single=single, padded=padded, limit=TOLERANCE)
    if not max(single, padded) <= TOLERANCE:
        raise ParityError(
            f"the graph differs from the torch model by {single:.2g} nats, in a padded batch by {padded:.2g} (limit "
            f"{TOLERANCE:g})",
            "Its architecture does something that cannot be traced; please report it.",
        )
    return found


def rows_of(graph: EncoderGraph, batch: PaddedBatch) -> Logits:
    """Return the logits of each text of a batch: [labels], or [tokens, labels] without padding."""
    logits = graph.run(batch.ids, batch.attention_mask, batch.type_ids)
    if not graph.by_token:
        return list(logits)
    return [row[mask > 0] for row, mask in zip(logits, batch.attention_mask, strict=True)]


def all_rows(graph: EncoderGraph, encoder: TextEncoder, texts: Sequence[EncodedText]) -> Logits:
    """Return the logits of each of many texts, in their order."""
    found: Logits = [np.empty(0, np.float32)] * len(texts)
    for places, batch in encoder.batches(texts, _BATCH_TOKENS):
        for place, row in zip(places, rows_of(graph, batch), strict=True):
            found[place] = row
    return found


def against_fp32(
    reference: Logits,
    stored: Logits,
    *,
    format: Format,  # noqa: A002 - the recipe's word
    multi_label: bool = False,
    metric: tuple[str, float, float] | None = None,
) -> LabelQuantizationParity:
    """Compare the logits of a stored graph with those of the fp32 graph.

    Args:
        reference: The fp32 graph's, of each text.
        stored: The stored graph's.
        format: The format, whose limits apply.
        multi_label: Whether each label is a yes or no of its own.
        metric: Name of the task's metric, its value with the fp32 graph and with the stored graph.
    """
    p = np.concatenate([np.atleast_2d(row) for row in reference])
    q = np.concatenate([np.atleast_2d(row) for row in stored])
    if multi_label:
        p, q = (np.stack([np.zeros_like(each), each], axis=-1).reshape(-1, 2) for each in (p, q))
    p, q = log_softmax(p), log_softmax(q)
    rows, limits = np.arange(len(p)), FORMAT_SPECS[format].limits
    margin = p.max(axis=1) - p[rows, q.argmax(axis=1)]
    return LabelQuantizationParity(
        examples=len(reference),
        kl=float((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64).mean()),
        kl_limit=limits.kl,
        disagreement=float((margin > TOP1_MARGIN).mean()),
        disagreement_limit=limits.top1_disagreement,
        metric=metric and metric[0],
        metric_fp32=metric and metric[1],
        metric_stored=metric and metric[2],
        metric_drop_limit=None if metric is None else limits.metric_drop,
    )


def enforce(figures: LabelQuantizationParity, *, forced: bool, member: str) -> bool:
    """Raise a ParityError if figures are over their limits, and not `forced`.

    Returns:
        Whether figures are over a limit and were accepted.
    """
    pairs = {"kl": (figures.kl, figures.kl_limit), "disagreement": (figures.disagreement, figures.disagreement_limit)}
    if figures.metric_fp32 is not None and figures.metric_stored is not None:
        # One example of a few is no loss that can be measured.
        room = max(figures.metric_drop_limit or 0.0, 2 / max(1, figures.examples))
        pairs[f"loss of {figures.metric}"] = (figures.metric_fp32 - figures.metric_stored, room)
    if all(value <= limit for value, limit in pairs.values()):
        return False
    if forced and all(math.isfinite(value) for value, _ in pairs.values()):
        return True
    table = ", ".join(f"{name} {value:.2g} (limit {limit:.2g})" for name, (value, limit) in pairs.items())
    raise ParityError(
        f"the graph of member {member!r} is too far from the fp32 graph on {figures.examples} examples: {table}",
        "Choose a format with more bits for it, or keep it as it is with --force.",
    )


def _arrays(batch: PaddedBatch) -> tuple[NDArray[np.int64], ...]:
    return batch.ids, batch.attention_mask, batch.type_ids


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(log_softmax(one) - log_softmax(other)).max())
