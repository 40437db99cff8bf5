"""Checks of a decoded manifest over labels: it may come from anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.bundle.graph_io import GRAPH_TENSORS
from edgemix.bundle.label_bundle.manifest import EncoderMember, RulesMember, member_folder
from edgemix.bundle.manifest import SCHEMA
from edgemix.bundle.manifest_validation import (
    MAX_CONTEXT,
    MAX_VOCABULARY,
    file_errors,
    name_errors,
    weight_errors,
)
from edgemix.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemix.bundle.label_bundle.manifest import LabelManifest, LabelMember

MAX_LABELS = 1 << 16
LONGEST_LABEL = 256
_LONGEST_TOKEN = 1024
_SUM_TOLERANCE = 1e-6


def label_validation_errors(manifest: LabelManifest) -> list[str]:
    """Return what is wrong with a decoded manifest, one line each; an empty list if it is valid."""
    names = [member.name for member in manifest.members]
    return [
        *([] if 5 <= manifest.schema <= SCHEMA else [f"schema is {manifest.schema}, and may be 5 to {SCHEMA}"]),
        *([] if manifest.task in TASKS and TASKS[manifest.task].shared == "labels" else [f"task is {manifest.task}"]),
        *name_errors(names),
        *_label_errors(manifest),
        *(f"members: {each.name!r}: {error}" for each in manifest.members for error in _member_errors(each, manifest)),
        *weight_errors(manifest.weights, names),
        *_count_errors(manifest, names),
        *file_errors(manifest),
    ]


def _label_errors(manifest: LabelManifest) -> Iterator[str]:
    labels = manifest.labels
    if manifest.task == "fill-mask":
        if labels:
            yield "labels: fill-mask has none but its tokens"
    elif not (1 if manifest.multi_label else 2) <= len(labels) <= MAX_LABELS:
        yield f"labels: there are {len(labels):,}, and may be 2 to {MAX_LABELS:,}"
    if len(set(labels)) < len(labels):
        yield "labels: one is there twice"
    if not all(0 < len(label) <= LONGEST_LABEL for label in labels):
        yield f"labels: one has not 1 to {LONGEST_LABEL} characters"
    if manifest.multi_label and manifest.task != "text-classification":
        yield f"multi_label: {manifest.task} has no examples with several labels"
    prior = manifest.prior
    if prior and (len(prior) != len(labels) or not all(0 < share <= 1 for share in prior)):
        yield "prior: it is no share above 0 for each label"
    if prior and not manifest.multi_label and abs(sum(prior) - 1) > _SUM_TOLERANCE:
        yield "prior: it does not sum to 1"


def _member_errors(member: LabelMember, manifest: LabelManifest) -> Iterator[str]:
    if len(set(member.labels)) < len(member.labels) or not set(member.labels) <= set(manifest.labels):
        yield "its labels are not the mixture's, each once"
    if not member.labels and manifest.task != "fill-mask":
        yield "it knows no label"
    if not 1e-3 <= member.temperature <= 1e3:
        yield f"its temperature is {member.temperature}, and may be 0.001 to 1000"
    folder = f"{member_folder(member.name)}/"
    if not all(path.startswith(folder) for path in member.paths):
        yield f"a file of it is not in the folder {folder}"
    if isinstance(member, EncoderMember):
        yield from _encoder_errors(member)
    elif isinstance(member, RulesMember) and manifest.task == "fill-mask":
        yield "fill-mask has no rules"


def _encoder_errors(member: EncoderMember) -> Iterator[str]:
    tensors, tokenizer = GRAPH_TENSORS["encoder"], member.tokenizer
    if not member.graph.endswith(".onnx"):
        yield f"its graph {member.graph!r} is no .onnx file"
    if not tokenizer.path.endswith(".json"):
        yield f"its tokenizer {tokenizer.path!r} is no .json file"
    if not tensors.inputs <= set(member.inputs) <= tensors.inputs | tensors.optional_inputs:
        yield f"its graph reads {', '.join(member.inputs)}"
    if not 1 <= tokenizer.vocabulary <= MAX_VOCABULARY:
        yield f"its vocabulary is {tokenizer.vocabulary}, and may be 1 to {MAX_VOCABULARY}"
    if not 1 <= tokenizer.max_length <= MAX_CONTEXT:
        yield f"its max_length is {tokenizer.max_length}, and may be 1 to {MAX_CONTEXT}"
    if not 0 <= tokenizer.pad_type_id < 1 << 16:
        yield f"its pad_type_id is {tokenizer.pad_type_id}"
    if any(len(text) > _LONGEST_TOKEN for text in tokenizer.special_tokens.values()):
        yield f"a special token has more than {_LONGEST_TOKEN} characters"
    if member.source.parameters < 0 or member.cost < 0:
        yield "a negative number of parameters, or a negative cost"


def _count_errors(manifest: LabelManifest, names: list[str]) -> Iterator[str]:
    if manifest.counts and (
        manifest.counts.keys() != set(names) or not all(count >= 0 for count in manifest.counts.values())
    ):
        yield "counts: they are not 0 or more for each member"
