"""Graphs of encoders with their heads against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_encoders import CONFIGS, VOCABULARY, tiny_encoder

from edgemix.bundle.graph_safety import verify_graph
from edgemix.export.graphs.encoder import build_encoder, save_encoder
from edgemix.runtime.graphs.encoder import EncoderGraph
from edgemix.runtime.graphs.providers import PROVIDERS

HEADS = ("SequenceClassification", "TokenClassification", "MaskedLM")
ROWS = [
    *((kind, HEADS[0]) for kind in CONFIGS),
    *((kind, head) for kind in ("bert", "modernbert", "electra") for head in HEADS[1:]),
    ("deberta-v2", HEADS[2]),
    ("qwen2", HEADS[1]),
]
"""Each architecture with one head, and each head with those whose heads differ."""
LENGTHS = ([1], [30, 30], [5, 17, 2], [60, 3])


def expected(model, ids):
    """Logits of texts one by one."""
    inputs = {"input_ids": torch.tensor(ids[None]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


@pytest.mark.parametrize(("kind", "head"), ROWS)
def test_a_graph_computes_what_torch_does_padded_or_not(kind, head, tmp_path):
    model = tiny_encoder(kind, head)
    save_encoder(build_encoder(model), tmp_path / "model.onnx")
    verify_graph(tmp_path / "model.onnx")
    graph = EncoderGraph.load(tmp_path / "model.onnx", PROVIDERS["cpu"], threads=1, name=kind)
    side = "left" if kind == "xlnet" else "right"
    for lengths in LENGTHS:
        generator = np.random.default_rng(sum(lengths))
        texts = [generator.integers(3, VOCABULARY, length) for length in lengths]
        longest = max(lengths)
        ids = np.full((len(texts), longest), model.config.pad_token_id or 0, np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        logits = graph.run(ids, mask, np.zeros_like(ids))
        for row, text in enumerate(texts):
            own = logits[row] if head == HEADS[0] else logits[row, mask[row] > 0]
            np.testing.assert_allclose(own, expected(model, text), atol=2e-5, rtol=1e-4)
