"""Students that draft with some tokens only, made from closed forms."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemix.bundle.manifest import DraftGraph
from edgemix.bundle.reader import read_manifest
from edgemix.bundle.writer import write_manifest
from edgemix.files import hash_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GRAPH, TOKENS = "student/draft.onnx", "student/draft_tokens.json"


def write_cut_graph(source: Path, output: Path, tokens: Sequence[int]) -> None:
    """A copy of a graph whose logits are those of some tokens."""
    model = onnx.load(source)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[:] = ["all_logits"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(tokens, np.int64), "kept_tokens"))
    model.graph.node.append(helper.make_node("Gather", ["all_logits", "kept_tokens"], ["logits"], axis=2))
    logits = next(output for output in model.graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_value = len(tokens)
    onnx.save(model, output)


def cut_student(bundle: Path, tokens: Sequence[int]) -> Path:
    """Let the student of a bundle draft with some tokens only."""
    manifest = read_manifest(bundle)
    write_cut_graph(bundle / manifest.student.graph, bundle / GRAPH, tokens)
    (bundle / TOKENS).write_text(json.dumps(list(tokens)))
    files = manifest.files | {name: hash_file(bundle / name) for name in (GRAPH, TOKENS)}
    student = msgspec.structs.replace(manifest.student, draft=DraftGraph(GRAPH, TOKENS, len(tokens)))
    write_manifest(bundle, msgspec.structs.replace(manifest, student=student, files=files))
    return bundle
