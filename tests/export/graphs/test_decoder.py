"""Tiny random models of each architecture, exported and held against torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers.tiny_models import tiny_model

from edgemix.bundle.manifest import GraphParity
from edgemix.errors import EdgemixError, InputError, ParityError
from edgemix.export.graphs import mobius
from edgemix.export.graphs.decoder import PATHS, ExportPath, export_graph
from edgemix.progress import NO_PROGRESS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

TOLERANCE = 1e-4

EXPORTERS = {
    "llama": "mobius",
    "llama-tied": "mobius",
    "llama-head-20": "mobius-unfused",
    "gpt2": "mobius",
    "qwen2": "mobius",
    "qwen3": "mobius",
    "mistral": "mobius",
    "mistral-window": "mobius",
    "phi3": "mobius",
    "gemma2": "mobius",
    "gpt_neox": "mobius",
    "opt": "mobius",
    "stablelm": "mobius",
}


def run(path: Path, length: int, keep: int | None) -> np.ndarray:
    """Logits [1, kept, vocabulary] of a text without a past."""
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, 150, (1, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    for tensor in session.get_inputs():
        if tensor.name.startswith("past"):
            feed[tensor.name] = np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float32)
    feed = {tensor.name: feed[tensor.name] for tensor in session.get_inputs()}
    return session.run(["logits"], feed | ({} if keep is None else {"logits_to_keep": np.array([keep])}))[0]


class Listener:
    """Records progress messages."""

    stage = NO_PROGRESS.stage

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def load(folder: Path) -> ir.Model:
    return ir.load(folder / "model.onnx")


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def only(exporter: str) -> list[ExportPath]:
    """Return one path of the three."""
    return [path for path in PATHS if path.exporter == exporter]


def failing(message: str) -> ExportPath:
    def build(model: PreTrainedModel) -> ir.Model:
        raise RuntimeError(message)

    return ExportPath("mobius", "shared", build)


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTERS.items())
def test_graph_is_the_model(architecture: str, exporter: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    exported = export_graph(model, tmp_path, target="cpu")
    figures = exported.parity
    assert max(figures.prefill, figures.decode, figures.padded_batch) < TOLERANCE
    assert (exported.config.exporter, exported.config.layers) == (exporter, model.config.num_hidden_layers)
    logits = run(tmp_path, 9, None)
    assert logits.shape[1] == 9
    for keep in (1, 3, 9, 12):
        np.testing.assert_allclose(run(tmp_path, 9, keep), logits[:, -keep:], rtol=1e-4, atol=1e-4)
    assert (exported.config.vocabulary, exported.config.context) == (model.config.vocab_size, 256)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("exporter", ["mobius", "mobius-unfused"])
def test_rotary_tables_have_a_row_for_each_token_of_the_context(tmp_path: Path, exporter: str) -> None:
    """They had one for every position that the configuration states, and outweighed the model (vllm 44738)."""
    model = tiny_model("llama", max_position_embeddings=300_000)
    log = Listener()
    for context, expected in ((None, 8192), (64, 64), (20_000, 20_000)):
        graph = export_graph(model, tmp_path, target="cpu", context=context, paths=only(exporter), progress=log)
        assert graph.config.context == expected
        tables = [value for name, value in load(tmp_path).graph.initializers.items() if name.endswith("_cache")]
        assert {value.shape[0] for value in tables} == {expected}
    assert [line for line in log.lines if "8,192 of 300,000 tokens" in line]
    assert len(log.lines) == 1


def test_a_configuration_with_absurdly_many_positions_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 1 << 40
    with pytest.raises(InputError, match="positions"):
        export_graph(model, tmp_path, target="cpu", context=64)


def test_traced_graph_is_the_model(tmp_path: Path) -> None:
    """One graph serves prefill, decode and batches, honors a sliding window, and holds a tied weight once."""
    model = tiny_model("mistral-window", tie_word_embeddings=True)
    exported = export_graph(model, tmp_path, target="cpu", paths=only("transformers"))
    figures = exported.parity
    assert max(figures.prefill, figures.decode, figures.padded_batch) < TOLERANCE
    assert (exported.config.exporter, exported.config.cache, exported.config.layers) == ("transformers", "growing", 2)
    shapes = Counter(tuple(value.shape) for value in load(tmp_path).graph.initializers.values())
    assert (shapes[160, 64], shapes[64, 160]) == (1, 0)


def test_shared_cache_graph_has_no_masks_or_casts_in_its_layers(tmp_path: Path) -> None:
    counts = []
    for layers in (2, 3):
        export_graph(tiny_model("llama", num_hidden_layers=layers), tmp_path, target="cpu")
        counts.append(operators(load(tmp_path)))
    layer = counts[1] - counts[0]
    assert layer == Counter(MatMul=5, Mul=2, Sigmoid=1, GroupQueryAttention=1, SkipSimplifiedLayerNormalization=2)


def test_position_ids_are_an_input_only_where_they_are_used(tmp_path: Path) -> None:
    names = {}
    for architecture in ("llama", "gpt2"):
        export_graph(tiny_model(architecture), tmp_path, target="cpu")
        names[architecture] = {value.name for value in load(tmp_path).graph.inputs}
    assert names["gpt2"] - names["llama"] == {"position_ids"}


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        export_graph(tiny_model("llama"), tmp_path / name, target="cpu")
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.onnx", "model.onnx.data")])
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0][0]
    assert b"site-packages" not in files[0][0]


def test_cuda_graph_is_fp32_at_an_opset_that_cuda_has_kernels_for(tmp_path: Path) -> None:
    exported = export_graph(tiny_model("llama"), tmp_path, target="cuda")
    model = load(tmp_path)
    assert exported.config.dtype == "float32"
    assert model.graph.opset_imports[""] == 23
    assert operators(model)["GroupQueryAttention"] == 2


def test_norm_epsilon_is_the_models_own(tmp_path: Path) -> None:
    """mobius reads OPT's epsilon from a key that OPT does not have, and was 1e-3 off."""
    model = tiny_model("opt")
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-3
    assert export_graph(model, tmp_path, target="cpu").config.exporter == "mobius"


def test_graph_without_its_sliding_windows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GroupQueryAttention replaces the mask that holds the windows, so the graph forgot them; and mobius' Gemma 2 with
    standard Attention gives them to the wrong layers."""
    monkeypatch.setattr(mobius, "sliding_windows", lambda config: (None,) * config.num_hidden_layers)
    listener = Listener()
    with pytest.raises(ParityError) as caught:
        export_graph(tiny_model("gemma2"), tmp_path, target="cpu", paths=PATHS[:2], progress=listener)
    for exporter, line in zip(("mobius", "mobius-unfused"), listener.lines, strict=True):
        assert f"{exporter} is refused: the graph differs from the torch model" in line
        assert f"{exporter}: the graph differs from the torch model" in str(caught.value)


def test_paths_refused_are_recorded(tmp_path: Path) -> None:
    listener = Listener()
    exported = export_graph(tiny_model("llama-head-20"), tmp_path, target="cpu", progress=listener)
    assert exported.fallbacks == ("mobius: GroupQueryAttention cannot do heads of size 20 of which 20 are rotated",)
    assert len(listener.lines) == 1


def test_tied_head_is_stored_once_where_mobius_copies_it(tmp_path: Path) -> None:
    export_graph(tiny_model("gemma2", tie_word_embeddings=True), tmp_path, target="cpu")
    shapes = Counter(tuple(value.shape) for value in load(tmp_path).graph.initializers.values())
    assert (shapes[160, 64], shapes[64, 160]) == (1, 0)


@pytest.mark.parametrize("model_type", ["mamba", "recurrent_gemma"])
def test_models_without_a_key_value_cache_are_refused(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(EdgemixError, match=f"model type '{model_type}'") as caught:
        export_graph(tiny_model(model_type), tmp_path, target="cpu")
    assert "transformers: its state is not a cache of keys and values" in str(caught.value)


def test_windows_that_no_path_can_be_checked_for_are_refused_without_fused_attention() -> None:
    """mobius' standard Attention ignores a uniform window, which a short text cannot show."""
    model = tiny_model("mistral", sliding_window=2000, hidden_size=80, max_position_embeddings=4096)
    with pytest.raises(EdgemixError, match="sliding windows"):
        mobius.build(model, fused=False)


def test_wrong_rotation_of_long_positions_is_refused() -> None:
    """mobius scales dynamic rotary embeddings from the first token on, which a short text hardly shows."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(EdgemixError, match="rotary embedding"):
        mobius.build(tiny_model("llama", rope_parameters=rope), fused=True)


def test_graph_with_weights_that_the_model_lacks_is_refused() -> None:
    model = tiny_model("falcon", new_decoder_architecture=False)
    with pytest.raises(EdgemixError, match="weights that the model lacks, such as transformer"):
        mobius.build(model, fused=True)


def test_type_that_no_path_knows_is_named_with_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.config), "model_type", "abacus")
    with pytest.raises(EdgemixError) as caught:
        export_graph(model, tmp_path, target="cpu", paths=(PATHS[0], failing("first line\nsecond line")))
    assert not isinstance(caught.value, ParityError)
    assert "'abacus'" in str(caught.value)
    assert "RuntimeError: first line" in str(caught.value)
    assert "second line" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_graph_over_the_limit_needs_force(tmp_path: Path) -> None:
    paths = only("mobius")
    figures = GraphParity(prefill=0.5, decode=0.1, padded_batch=0.1, limit=1e-4)
    with pytest.raises(ParityError, match=r"prefill 0\.5 \(limit 0\.0001\)"):
        export_graph(tiny_model("llama"), tmp_path, target="cpu", paths=paths, gate=lambda path, config: figures)
    assert list(tmp_path.iterdir()) == []
    exported = export_graph(
        tiny_model("llama"), tmp_path, target="cpu", paths=paths, gate=lambda path, config: figures, force=True
    )
    assert exported.parity == figures
    assert exported.path.is_file()


def test_force_does_not_take_a_graph_that_gives_no_numbers(tmp_path: Path) -> None:
    paths = only("mobius")
    figures = GraphParity(prefill=0.0, decode=float("nan"), padded_batch=0.0, limit=1e-4)
    with pytest.raises(ParityError):
        export_graph(
            tiny_model("llama"), tmp_path, target="cpu", paths=paths, gate=lambda path, config: figures, force=True
        )


def test_reasons_hold_no_paths_of_this_machine(tmp_path: Path) -> None:
    """They go into the manifest, which is the same wherever it is made."""

    def gate(path: Path, config: object) -> GraphParity:
        raise EdgemixError(f"cannot load {path}")

    with pytest.raises(EdgemixError) as caught:
        export_graph(tiny_model("llama"), tmp_path, target="cpu", paths=PATHS[:1], gate=gate)
    assert "mobius: cannot load .mobius/model.onnx" in str(caught.value)


def test_full_disk_is_no_reason_for_the_next_path(tmp_path: Path) -> None:
    def gate(path: Path, config: object) -> GraphParity:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export_graph(tiny_model("llama"), tmp_path, target="cpu", gate=gate)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".mobius").mkdir()
    (tmp_path / ".mobius" / "model.onnx").write_bytes(b"half a graph")
    export_graph(tiny_model("llama"), tmp_path, target="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
