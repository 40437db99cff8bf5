"""Graphs as they are exported, whose calls are recorded (compare tests/runtime/test_captured_calls.py): rotary tables
end with the context, and batch-invariant attention writes one token more than it was given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.tiny_models import tiny_model

from edgemix.export.graphs.decoder import export_graph
from edgemix.export.quantization import quantize
from edgemix.formats import TARGETS
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.graphs.providers import PROVIDERS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.export.graphs.decoder import ExportedGraph
    from edgemix.formats import Format, Target

CONTEXT = 40
"""Less than a fresh cache holds, and no power of two."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[Target, ExportedGraph]:
    model, folder = tiny_model("llama", max_position_embeddings=CONTEXT), tmp_path_factory.mktemp("exported")
    return {target: export_graph(model, folder / target, target=target) for target in TARGETS}


@pytest.mark.parametrize(("target", "weight_format"), [("cpu", "fp32"), ("cpu", "int8"), ("cuda", "fp32")])
def test_recorded_calls_are_exact_to_the_end_of_the_context(
    target: Target, weight_format: Format, exported: dict[Target, ExportedGraph], tmp_path: Path
) -> None:
    """Masks as wide as the cache were wider than the tables, and too wide for the token that is written twice."""
    graph = exported[target]
    quantize(graph.path, tmp_path / "model.onnx", weight_format, target=target)
    ids, found = np.random.default_rng(0).integers(3, 160, CONTEXT), []
    for provider in (PROVIDERS["cpu"], replace(PROVIDERS["cpu"], name="recording", captures=True)):
        member = DecoderGraph.load(tmp_path / "model.onnx", graph.config, provider, threads=1)
        cache = member.new_cache()
        logits = [member.extend(cache, [ids[:3]]).copy()]
        logits += [member.extend(cache, ids[None, at : at + 1]).copy() for at in range(3, CONTEXT - 4)]
        for _ in range(3):
            cache.rollback([CONTEXT - 4])
            logits.append(member.extend_all(cache, [ids[-4:]])[0].copy())
        found.append(np.concatenate(logits))
    np.testing.assert_array_equal(found[1], found[0])


def test_logits_to_keep_may_exceed_the_tokens(exported: dict[Target, ExportedGraph]) -> None:
    """Who asks for the logits of more tokens than a call has gets them all."""
    session = DecoderGraph.load(exported["cpu"].path, exported["cpu"].config, threads=1)._session
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    every = session.run(["logits"], feeds)[0]
    for keep, rows in ((1, 1), (2, 2), (3, 3), (4, 3), (100, 3)):
        kept = session.run(["logits"], feeds | {"logits_to_keep": np.array([keep])})[0]
        np.testing.assert_allclose(kept, every[:, 3 - rows :], atol=1e-6)
