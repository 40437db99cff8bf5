import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest

from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime.graphs import providers
from edgemix.runtime.graphs.providers import PROVIDERS, Provider, choose, open_session, why_not

ABSENT = Provider("cuda", "NoSuchExecutionProvider", "cuda", remedy="Install the other package.")
WORKING = Provider("cuda", "CPUExecutionProvider", "cpu")


@pytest.fixture
def cuda(monkeypatch):
    """Puts another record in the place of CUDA's."""
    return lambda record: monkeypatch.setitem(PROVIDERS, "cuda", record)


def test_the_probe_is_a_sound_graph():
    onnx.checker.check_model(onnx.load_from_string(providers._PROBE), full_check=True)


def test_the_cpu_works():
    assert why_not(PROVIDERS["cpu"]) == ""
    assert choose("cpu") is PROVIDERS["cpu"]


def test_auto_falls_back_to_the_cpu_and_says_why(cuda, caplog):
    cuda(ABSENT)
    with caplog.at_level(logging.INFO):
        assert choose("auto").name == "cpu"
    assert "running on cpu" in caplog.text
    assert "NoSuchExecutionProvider" in caplog.text


def test_auto_takes_cuda_where_it_works(cuda, caplog):
    cuda(WORKING)
    with caplog.at_level(logging.INFO):
        assert choose("auto") is WORKING
    assert "running on cuda" in caplog.text


def test_a_provider_that_is_asked_for_and_missing_is_an_error_with_a_remedy(cuda):
    cuda(ABSENT)
    with pytest.raises(EdgemixError, match="cuda") as caught:
        choose("cuda")
    assert caught.value.remedy == "Install the other package."


def test_a_provider_that_is_listed_and_does_not_start_is_found_out(monkeypatch):
    """ONNX Runtime lists CUDA wherever its package is installed, and falls back to the CPU without a driver."""
    ort = providers._onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["LazyExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        providers,
        "create_session",
        lambda graph, _, options: ort.InferenceSession(graph, options),  # what falling back is
    )
    assert "does not start" in why_not(replace(ABSENT, execution_provider="LazyExecutionProvider"))


def test_an_unknown_provider_is_refused():
    with pytest.raises(InputError, match="'tpu'"):
        choose("tpu")


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(range(256))])
def test_a_broken_graph_is_a_bundle_error(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="cannot load") as caught:
        open_session(path, PROVIDERS["cpu"])
    assert "ONNXRuntimeError" not in str(caught.value)


def test_a_missing_graph_is_a_bundle_error(tmp_path):
    with pytest.raises(BundleError, match="there is no graph"):
        open_session(tmp_path / "model.onnx", PROVIDERS["cpu"])


def test_threads_spin_within_a_call_only():
    options = providers.session_options(3)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 3


def test_placing_an_array_on_the_cpu_copies_nothing():
    array = np.zeros((2, 3), np.float32)
    assert providers.place(array, PROVIDERS["cpu"]).data_ptr() == array.ctypes.data
