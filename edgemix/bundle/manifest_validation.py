"""Checks of a decoded manifest: it may come from anywhere."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.bundle import paths
from edgemix.bundle.graph_io import GRAPH_TENSORS
from edgemix.bundle.manifest import MANIFEST, MEMBER_NAME, SCHEMA, STUDENT
from edgemix.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.bundle.manifest import BundleManifest, Manifest, Weights

# Far beyond every model there is, and small enough that nothing sized by them exhausts memory.
MAX_LAYERS = 1 << 12
MAX_VOCABULARY = 1 << 24
MAX_CONTEXT = 1 << 26
MAX_MEMBERS = 1 << 10
_SUM_TOLERANCE = 1e-6
_LONGEST_TOKEN = 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")


def validation_errors(manifest: Manifest) -> list[str]:
    """Return what is wrong with a decoded manifest, one line each; an empty list if it is valid."""
    return [
        *([] if 1 <= manifest.schema <= SCHEMA else [f"schema is {manifest.schema}, and edgemix knows 1 to {SCHEMA}"]),
        *_member_errors(manifest),
        *_graph_errors(manifest),
        *_draft_errors(manifest),
        *([] if manifest.ngrams >= 0 else [f"ngrams: there are {manifest.ngrams}"]),
        *_shared_graph_errors(manifest),
        *weight_errors(manifest.weights, [member.name for member in manifest.members]),
        *_parity_weight_errors(manifest),
        *_tokenizer_errors(manifest),
        *file_errors(manifest),
    ]


def name_errors(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the names of members."""
    if not 1 <= len(names) <= MAX_MEMBERS:
        yield f"members: there are {len(names):,}, and may be 1 to {MAX_MEMBERS:,}"
    counts = Counter(name.casefold() for name in names)
    for name in names:
        if not MEMBER_NAME.fullmatch(name):
            yield f"members: {name!r} is no name for a member"
        if counts[name.casefold()] > 1:
            yield f"members: {name!r} is there more than once"


def _member_errors(manifest: Manifest) -> Iterator[str]:
    names = [member.name for member in manifest.members]
    yield from name_errors(names)
    if manifest.student is not None:
        if manifest.student.name != STUDENT:
            yield f"student: is called {manifest.student.name!r}"
        if not manifest.student.graph.startswith(f"{STUDENT}/"):
            yield f"student: its graph {manifest.student.graph!r} is not in the folder {STUDENT}"
        if STUDENT in map(str.casefold, names):
            yield f"members: {STUDENT!r} is the student's name"


def _graph_errors(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.graphs:
        where = STUDENT if entry is manifest.student else f"members: {entry.name!r}"
        if entry.source.parameters < 0:
            yield f"{where}: a negative number of parameters"
        if not entry.graph.endswith(".onnx"):
            yield f"{where}: its graph {entry.graph!r} is no .onnx file"
        kind: str = TASKS[manifest.task].graph
        if entry.kind != kind:
            yield f"{where}: its graph is a {entry.kind}, and {manifest.task} needs a {kind}"
        fewest = GRAPH_TENSORS[entry.kind].min_layers
        bounds = {"layers": (fewest, MAX_LAYERS), "vocabulary": (1, MAX_VOCABULARY), "context": (1, MAX_CONTEXT)}
        for name, (least, most) in bounds.items():
            value = getattr(entry.config, name)
            if not least <= value <= most:
                yield f"{where}: {name} is {value}, and may be {least} to {most}"
        if not 0 <= entry.eight_bits <= 1:
            yield f"{where}: a share of {entry.eight_bits} in 8 bits"
        if entry.sparse is not None and entry.sparse.size < 1:
            yield f"{where}: its sparse weights would expand to {entry.sparse.size} bytes"


def _draft_errors(manifest: Manifest) -> Iterator[str]:
    yield from (f"members: {each.name!r} drafts, as only the student may" for each in manifest.members if each.draft)
    if manifest.student is None or (draft := manifest.student.draft) is None:
        return
    for path, suffix in ((draft.graph, ".onnx"), (draft.tokens, ".json")):
        if not path.startswith(f"{STUDENT}/") or not path.endswith(suffix):
            yield f"student: drafts with {path!r}, which is no {suffix} file in the folder {STUDENT}"
    if draft.graph == manifest.student.graph:
        yield f"student: drafts with {draft.graph!r}, its whole graph"
    if manifest.members and not 1 <= draft.vocabulary <= manifest.vocabulary:
        yield f"student: drafts {draft.vocabulary} tokens of the tokenizer's {manifest.vocabulary}"


def _shared_graph_errors(manifest: Manifest) -> Iterator[str]:
    groups = [(graph, list(group)) for graph, group in groupby(manifest.graphs, key=lambda entry: entry.graph)]
    for graph, count in Counter(graph for graph, _ in groups).items():
        if count > 1:
            yield f"members: those of the graph {graph!r} do not follow each other"
    for graph, entries in groups:
        counts = {entry.config.member_count for entry in entries}
        if counts != {len(entries)} or len({entry.config for entry in entries}) > 1:
            wanted = ", ".join(map(str, sorted(counts)))
            yield f"members: the graph {graph!r} has {len(entries)} consecutive members, and should have {wanted}"


def weight_errors(weights: Weights, names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a mixture's weights."""
    yield from _share_errors("weights.default", weights.default, names)
    for domain, shares in weights.domains.items():
        yield from _share_errors(f"weights.domains[{domain!r}]", shares, names)


def _parity_weight_errors(manifest: Manifest) -> Iterator[str]:
    if manifest.quantization is not None:
        names = [member.name for member in manifest.members]
        yield from _share_errors("quantization.weights", manifest.quantization.weights, names)


def _share_errors(where: str, weights: Mapping[str, float], names: Sequence[str]) -> Iterator[str]:
    if weights.keys() != set(names):
        yield f"{where} is not over the members: {', '.join(map(repr, sorted(weights.keys() ^ set(names))))}"
    elif not all(0 <= weight <= 1 + _SUM_TOLERANCE for weight in weights.values()):
        yield f"{where} has a weight that is not between 0 and 1"
    elif not abs(math.fsum(weights.values()) - 1) <= _SUM_TOLERANCE:
        yield f"{where} does not sum to 1"


def _tokenizer_errors(manifest: Manifest) -> Iterator[str]:
    tokenizer = manifest.tokenizer
    if not 1 <= tokenizer.vocabulary <= MAX_VOCABULARY:
        yield f"tokenizer: vocabulary is {tokenizer.vocabulary}, and may be 1 to {MAX_VOCABULARY}"
    if any(len(text) > _LONGEST_TOKEN for text in tokenizer.special_tokens.values()):
        yield f"tokenizer: a special token has more than {_LONGEST_TOKEN} characters"
    if not manifest.members:
        return
    narrowest = min(entry.config.vocabulary for entry in manifest.graphs)
    if narrowest < manifest.vocabulary:
        yield f"student: its logits are {narrowest} wide, and the members share {manifest.vocabulary} tokens"
    special = tokenizer.eos if tokenizer.bos is None else (tokenizer.bos, *tokenizer.eos)
    if not all(0 <= token < tokenizer.vocabulary for token in special):
        yield f"tokenizer: a special token lies outside its vocabulary: {special}"
    if tokenizer.bos is not None and tokenizer.bos >= manifest.vocabulary:
        yield f"tokenizer: texts begin with token {tokenizer.bos}, which not every member has"


def file_errors(manifest: BundleManifest) -> Iterator[str]:
    """Yield what is wrong with the list of files, and numbers anywhere in the manifest that are not finite."""
    for name, entry in manifest.files.items():
        if reason := paths.path_error(name):
            yield f"files: the path {name[:200]!r} {reason}"
        if entry.size < 0:
            yield f"files: {name!r} has a negative size"
        if not _SHA256.fullmatch(entry.sha256):
            yield f"files: {name!r} has a sha256 that is none"
    if MANIFEST in manifest.files:
        yield f"files: {MANIFEST} cannot list itself"
    yield from (f"files: {name!r} is not listed" for name in manifest.stored_paths if name not in manifest.files)
    yield from (f"{where} is not a finite number" for where in _not_finite(msgspec.to_builtins(manifest), ""))


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where
