"""The student's draft graph, whose head has the rows of the most frequent tokens only.

A head of 49,152 tokens is half of the bytes that a small student reads per token. Drafts are verified, so any
distribution may propose them, and nearly all of a text consists of a sixth of the vocabulary (FR-Spec, arXiv
2502.14856).

Only the head is stored anew, in the draft graph's own file. All other weights are those in the whole graph's data file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgemix.bundle.graph_io import LOGITS
from edgemix.bundle.manifest import STUDENT, DraftGraph
from edgemix.errors import EdgemixError, storage_errors
from edgemix.export.data.text import windows
from edgemix.export.graphs.decoder import MODEL_FILE
from edgemix.export.graphs.rewrites import CONTRIB, add_initializer
from edgemix.files import write_atomically
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.text_sources import read_documents
from edgemix.runtime.graphs.decoder import DecoderGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from edgemix.bundle.manifest import MemberEntry, TokenizerEntry
    from edgemix.recipe.schema import Recipe

GRAPH_FILE, TOKENS_FILE = "draft.onnx", "draft_tokens.json"

MAX_ROWS = 8_192
MIN_VOCABULARY = 16_384
"""Vocabulary below which a smaller head saves too little."""
COUNTED, _LENGTH = 1_000_000, 512
"""Largest number of counted tokens of a domain, and tokens of a chunk."""
_PROBE = 32
"""Tokens on which the two graphs are compared."""
_CLOSE = 0.01
"""Largest difference of their logits, as a share of the largest logit: other rows differ by more, rounding by less."""

_POINTWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh"})
"""Elementwise operators that may follow a head: biases, scales, caps."""
_OUTPUTS = {
    ("", "MatMul"): 1,
    ("", "Gemm"): 1,
    (CONTRIB, "MatMulNBits"): 0,
    (CONTRIB, "MatMulIntegerToFloat"): 1,
}
"""Matrix products that a head may be -> the axis of the outputs in their weights."""


class _UnknownHeadError(Exception):
    """The graph's head has an unknown structure."""


def draft_size(vocabulary: int) -> int:
    """Return the number of tokens that the student drafts of a vocabulary; 0 for all of them."""
    return min(MAX_ROWS, vocabulary // 4 // 64 * 64) if vocabulary >= MIN_VOCABULARY else 0


def make_draft(
    recipe: Recipe,
    entry: MemberEntry,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    known: TokenizerEntry,
    progress: Progress = NO_PROGRESS,
) -> DraftGraph | None:
    """Write the student's draft graph beside its whole graph.

    Args:
        recipe: The recipe with the training text, in which tokens are counted.
        entry: The student's entry in the manifest.
        folder: The folder of its whole graph.
        tokenizer: The tokenizer.
        known: The tokenizer's entry in the manifest.
        progress: Progress callback; logs why there is no draft graph.

    Returns:
        The manifest's record of the draft graph; None if the student drafts with its whole graph.

    Raises:
        InputError: A text cannot be read.
        EdgemixError: The files cannot be written.
    """
    if not (size := draft_size(known.vocabulary)):
        return None
    with progress.stage("head for drafts"):
        texts = {
            domain: windows(
                read_documents(source, recipe.folder), tokenizer, _LENGTH, max_tokens=COUNTED, seed=recipe.seed
            )
            for domain, source in recipe.data.training.items()
        }
        tokens = frequent_tokens(texts.values(), known.vocabulary, size, always=known.eos)
        whole, graph, listed = folder / MODEL_FILE, folder / GRAPH_FILE, folder / TOKENS_FILE
        with storage_errors(f"writing {graph}"):
            reason = _write_draft(whole, graph, entry, tokens, next(iter(texts.values()))[0])
            if not reason:
                write_atomically(listed, msgspec.json.encode(tokens.tolist()))
                return DraftGraph(f"{STUDENT}/{GRAPH_FILE}", f"{STUDENT}/{TOKENS_FILE}", len(tokens))
            graph.unlink(missing_ok=True)
            listed.unlink(missing_ok=True)
    progress.log(f"{entry.name}: drafts with its whole head, as {reason}")
    return None


def frequent_tokens(
    domains: Iterable[Sequence[Sequence[int]]], vocabulary: int, size: int, *, always: Iterable[int] = ()
) -> NDArray[np.int64]:
    """Return the ids of the most frequent tokens, ascending: int64 [size].

    Args:
        domains: Texts as token ids; each domain counts as much as any other.
        vocabulary: Number of token ids.
        size: Number of ids. Of equally frequent tokens the lowest ids are taken, which were the most frequent ones when
            the tokenizer was trained.
        always: Ids that are always included.
    """
    shares = np.zeros(vocabulary)
    for texts in domains:
        counts = np.bincount(np.concatenate([np.asarray(text, np.int64) for text in texts]), minlength=vocabulary)
        shares += counts[:vocabulary] / counts.sum()
    shares[[*always]] = np.inf
    return np.sort(np.argsort(-shares, kind="stable")[:size])


def cut_head(source: Path, output: Path, tokens: NDArray[np.int64]) -> bool:
    """Write a decoder graph whose logits are those of some tokens.

    Args:
        source: The graph, in any format that `quantize` writes.
        output: In the same folder: all weights but the head's stay in the source's data file.
        tokens: int64 [tokens], the tokens, ascending.

    Returns:
        Whether the graph's head has a known structure; if not, nothing is written.
    """
    model = ir.load(source)
    try:
        _cut(model.graph, tokens)
    except _UnknownHeadError:
        return False
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, output)
    return True


def _write_draft(whole: Path, graph: Path, entry: MemberEntry, tokens: NDArray[np.int64], text: Sequence[int]) -> str:
    """Write the draft graph and compare its logits with the whole graph's.

    Returns:
        Why there is no draft graph; empty if there is.
    """
    if entry.sparse is not None:
        return "its weights are stored without their zeros"
    if not cut_head(whole, graph, tokens):
        return "that has an unknown structure"
    probe = np.array(text[: min(_PROBE, entry.config.context)], np.int64)
    config = msgspec.structs.replace(entry.config, vocabulary=len(tokens))
    try:
        found = DecoderGraph.load(graph, config, tokens=tokens).forward([probe])[0]
        expected = DecoderGraph.load(whole, entry.config).forward([probe])[0][:, tokens]
    except EdgemixError as error:
        return f"with a cut one it does not run: {error.message}"
    if not np.abs(found - expected).max() <= _CLOSE * np.abs(expected).max():
        return "with a cut one its logits differ"
    return ""


def _cut(graph: ir.Graph, tokens: NDArray[np.int64]) -> None:
    """Cut the head and the operators behind it.

    Raises:
        _UnknownHeadError: The head has an unknown structure; the graph may be half cut.
    """
    value = next((each for each in graph.outputs if each.name == LOGITS), None)
    if value is None or value.shape is None or not isinstance(vocabulary := value.shape[-1], int):
        raise _UnknownHeadError
    _cut_value(graph, value, vocabulary, tokens, readers=0)


def _cut_value(graph: ir.Graph, value: ir.Value, vocabulary: int, tokens: NDArray[np.int64], readers: int = 1) -> None:
    """Cut the nodes that compute a value [..., vocabulary], which has `readers` uses."""
    node = value.producer()
    if node is None or len(value.uses()) != readers:
        raise _UnknownHeadError
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:-1], len(tokens)])
    if (node.domain, node.op_type) in _OUTPUTS:
        _cut_product(graph, node, vocabulary, tokens)
        return
    if node.domain or node.op_type not in _POINTWISE:
        raise _UnknownHeadError
    activations = [each for each in node.inputs if each is not None and _dimensions(each) is None]
    made = [each for each in activations if not _is_scalar(each)]
    if len(made) != 1 and node.op_type != "Add":
        raise _UnknownHeadError
    _cut_pointwise(graph, node, range(len(node.inputs)), vocabulary, tokens)
    for each in made:
        _cut_value(graph, each, vocabulary, tokens)


def _is_scalar(value: ir.Value) -> bool:
    """Return whether a value is one number for all tokens: the scale of a rounded activation."""
    node = value.producer()
    if node is not None and node.op_type == "Div":
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "ReduceMax"


def _cut_product(graph: ir.Graph, node: ir.Node, vocabulary: int, tokens: NDArray[np.int64]) -> None:
    """Cut a product's weights, and its bias if it has one, to the outputs of some tokens."""
    axis, weights = _OUTPUTS[node.domain, node.op_type], range(1, len(node.inputs))
    if node.op_type == "MatMulIntegerToFloat":  # activation, weights, their scales, their zero points
        weights = range(1, 2)
        _cut_pointwise(graph, node, range(3, 4), vocabulary, tokens)
    if node.op_type == "Gemm":
        axis = 0 if node.attributes.get_int("transB", 0) else 1
        weights = range(1, 2)
        _cut_pointwise(graph, node, range(2, len(node.inputs)), vocabulary, tokens)
    for index in weights:
        if (value := node.inputs[index]) is not None:
            shape = _dimensions(value)
            if shape is None or len(shape) < 2 or shape[axis] != vocabulary:
                raise _UnknownHeadError
            node.replace_input_with(index, _take(graph, node, value, axis, tokens))
    if node.op_type == "MatMulNBits":
        node.attributes["N"] = ir.AttrInt64("N", len(tokens))


def _cut_pointwise(
    graph: ir.Graph, node: ir.Node, indices: Iterable[int], vocabulary: int, tokens: NDArray[np.int64]
) -> None:
    """Cut those of a node's constant inputs that have one number a token."""
    for index in indices:
        value = node.inputs[index]
        shape = None if value is None else _dimensions(value)
        if value is None or not shape or shape[-1] == 1:
            continue
        if shape[-1] != vocabulary:
            raise _UnknownHeadError
        node.replace_input_with(index, _take(graph, node, value, len(shape) - 1, tokens))


def _dimensions(value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of a constant, perhaps cast or transposed; None for other values."""
    if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Cast", "Transpose"):
        return None
    shape = _dimensions(node.inputs[0])
    return shape if shape is None or node.op_type == "Cast" else tuple(shape[axis] for axis in _order(node, shape))


def _order(transpose: ir.Node, shape: Sequence[int]) -> Sequence[int]:
    order: Sequence[int] = transpose.attributes.get_ints("perm", range(len(shape))[::-1])
    return order


def _take(graph: ir.Graph, reader: ir.Node, value: ir.Value, axis: int, tokens: NDArray[np.int64]) -> ir.Value:
    """Return a constant cut to some tokens, cast and transposed as the whole one."""
    node = value.producer()
    if node is None:
        return add_initializer(graph, f"{value.name}.draft", value.const_value.numpy().take(tokens, axis))
    source = node.inputs[0]
    if node.op_type == "Transpose":
        axis = _order(node, _dimensions(source) or ())[axis]
    part = _take(graph, reader, source, axis, tokens)
    copy = ir.node(node.op_type, [part], node.attributes)
    copy.outputs[0].type = value.type
    graph.insert_before(reader, copy)
    return copy.outputs[0]
