"""Tiny classifiers with known outputs, and bundles of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemix.bundle.label_bundle.manifest import (
    EncoderMember,
    EncoderParity,
    LabelManifest,
    MemberTokenizer,
    member_folder,
)
from edgemix.bundle.manifest import MANIFEST, SCHEMA, ModelSource, Weights
from edgemix.bundle.tokenizer_identity import TokenizerIdentity
from edgemix.bundle.writer import write_manifest
from edgemix.files import hash_file
from helpers.onnx_members import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.tasks import LabelTaskName

VOCABULARY = 258
"""Ids of the byte tokenizer: the bytes, and two special tokens."""


@dataclass(frozen=True, eq=False)
class ClosedClassifier:
    """A classifier of bytes: its logits are the mean of its table's rows, or each byte's row.

    Attributes:
        table: float32 [VOCABULARY, labels].
        labels: Its labels.
        temperature: What its logits are divided by.
        cost: See the manifest.
        max_length: Most bytes that it reads.
        by_token: Whether it has logits for each byte.
    """

    table: NDArray[np.float32]
    labels: tuple[str, ...]
    temperature: float = 1.0
    cost: float = 1.0
    max_length: int = 4096
    by_token: bool = False

    def logits(self, text: str) -> NDArray[np.float32]:
        """Return what the graph computes: [labels], or [bytes, labels]."""
        rows = self.table[list(text.encode()[: self.max_length])]
        return rows if self.by_token else rows.mean(axis=0)

    def probabilities(self, text: str) -> dict[str, float]:
        """Return the distribution of a text over its labels."""
        scores = np.exp(self.logits(text).astype(np.float64) / self.temperature)
        return dict(zip(self.labels, (scores / scores.sum()).tolist(), strict=True))


def random_classifier(seed: int, labels: str | tuple[str, ...] = "abc", **settings: object) -> ClosedClassifier:
    """A classifier with random logits."""
    table = np.random.default_rng(seed).normal(size=(VOCABULARY, len(labels))).astype(np.float32) * 6
    return ClosedClassifier(table, tuple(labels), **settings)  # type: ignore[arg-type]


def write_classifier(path: Path, member: ClosedClassifier) -> None:
    """Write its graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits" if member.by_token else "rows"])]
    if not member.by_token:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["rows", "column"], ["own"]),
            helper.make_node("ReduceSum", ["own", "one"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "one"], ["count"], keepdims=1),
            helper.make_node("Div", ["sum", "count"], ["logits"]),
        ]
    shape = ["batch", "sequence", len(member.labels)] if member.by_token else ["batch", len(member.labels)]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(member.table, "table"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@dataclass(frozen=True)
class LabelBundle:
    """Settings of a bundle that is written; see the manifest."""

    members: Mapping[str, ClosedClassifier]
    labels: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    task: LabelTaskName = "text-classification"
    settings: Mapping[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the bundle to a folder."""
        core = byte_tokenizer()
        entries = []
        for name, member in self.members.items():
            place = member_folder(name)
            write_classifier(folder / place / "model.onnx", member)
            tokenizer = folder / place / "tokenizer.json"
            core.save(str(tokenizer))
            entries.append(
                EncoderMember(
                    name=name,
                    labels=member.labels,
                    graph=f"{place}/model.onnx",
                    format="fp32",
                    source=ModelSource(model="closed-form", model_type="closed_form", parameters=1, sha256="0" * 64),
                    inputs=("input_ids", "attention_mask"),
                    tokenizer=MemberTokenizer(
                        path=f"{place}/tokenizer.json",
                        sha256=TokenizerIdentity.parse(tokenizer.read_bytes()).sha256(),
                        vocabulary=VOCABULARY,
                        max_length=member.max_length,
                        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
                    ),
                    parity=EncoderParity(single=0.0, padded=0.0, limit=1e-4),
                    temperature=member.temperature,
                    cost=member.cost,
                )
            )
        found = dict.fromkeys(label for member in self.members.values() for label in member.labels)
        names = list(self.members)
        manifest = LabelManifest(
            schema=SCHEMA,
            edgemix="0.1.0",
            target="cpu",
            seed=0,
            task=self.task,
            members=tuple(entries),
            labels=self.labels or tuple(found),
            weights=Weights(
                "fit" if self.domains else "given",
                dict(self.weights or dict.fromkeys(names, 1 / len(names))),
                {domain: dict(weights) for domain, weights in self.domains.items()},
            ),
            files={
                path.relative_to(folder).as_posix(): hash_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            },
            **self.settings,  # type: ignore[arg-type]
        )
        write_manifest(folder, manifest)
        return folder
