"""Execution providers: one frozen record a provider, with everything that differs between providers.

A new provider is a new row in `PROVIDERS`; the rest of the runtime reads its record and never its name.
"""

from __future__ import annotations

import io
import logging
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime.graphs.sparse_weights import expanded_files
from edgemix.runtime.processor import default_threads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.prepacked_weights import PrepackedWeights

LOG = logging.getLogger(__name__)

_RECORDING, _NOTHING = RLock(), nullcontext()

ProviderName = Literal["auto", "cpu", "cuda", "cuda-graphs"]

# Y = X + X on float[2]: the smallest graph that shows whether a provider computes at all.
_PROBE = bytes.fromhex(
    "080a3a390a0e0a01780a01781201792203416464120570726f62655a0f0a0178120a0a08080112040a020802620f0a0179120a0a0808011204"
    "0a02080242040a001015"
)


@dataclass(frozen=True, slots=True)
class Provider:
    """One ONNX Runtime execution provider.

    Attributes:
        name: The name that users give.
        execution_provider: ONNX Runtime's name of it.
        device: ONNX Runtime's name of the memory that holds the KV cache.
        options: The provider's options for ONNX Runtime.
        remedy: What to do where it was requested and does not work.
        packs: Whether its kernels have a weight layout of their own, which can be saved.
        captures: Whether repeated calls of one shape are recorded and replayed; see `cuda_graphs`. Meant for programs
            that generate in few threads, as ONNX Runtime records for each thread separately.
    """

    name: str
    execution_provider: str
    device: str
    options: tuple[tuple[str, str], ...] = ()
    remedy: str = ""
    packs: bool = False
    captures: bool = False


_CUDA = Provider(
    "cuda",
    "CUDAExecutionProvider",
    "cuda",
    # The arena grows by what is asked for, not by powers of two: weights come once and stay. TF32 would round fp32
    # products to 10 bits, which no parity gate has seen.
    options=(("device_id", "0"), ("arena_extend_strategy", "kSameAsRequested"), ("use_tf32", "0")),
    remedy="Install edgemix[gpu] (and not edgemix[cpu] beside it) on a machine with an NVIDIA driver, or use the "
    'provider "cpu".',
)
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("cpu", "CPUExecutionProvider", "cpu", packs=True),
    "cuda": _CUDA,
    "cuda-graphs": replace(
        _CUDA, name="cuda-graphs", options=(*_CUDA.options, ("enable_cuda_graph", "1")), captures=True
    ),
}


def choose(name: str) -> Provider:
    """Return the provider for `auto`, or for a name.

    `auto` takes CUDA where a graph really runs on it, else the CPU, and logs which.

    Raises:
        InputError: There is no provider of that name.
        EdgemixError: The provider asked for does not work here.
    """
    if name == "auto":
        trouble = why_not(PROVIDERS["cuda"])
        chosen = PROVIDERS["cpu"] if trouble else PROVIDERS["cuda"]
        LOG.info("running on %s%s", chosen.name, f" (cuda: {trouble})" if trouble else "")
        return chosen
    if name not in PROVIDERS:
        raise InputError(f"there is no provider {name!r}", f"Choose one of: auto, {', '.join(PROVIDERS)}.")
    if trouble := why_not(PROVIDERS[name]):
        raise EdgemixError(f"the provider {name!r} does not work here: {trouble}", PROVIDERS[name].remedy)
    return PROVIDERS[name]


@cache
def why_not(provider: Provider) -> str:
    """Return why a provider does not work here; empty where a small graph ran on it with the right result."""
    ort = _onnxruntime()
    if provider.execution_provider not in ort.get_available_providers():
        return f"this ONNX Runtime ({ort.__version__}) was built without {provider.execution_provider}"
    try:
        session = create_session(_PROBE, provider, session_options(1))
        answer = session.run(None, {"x": np.array([1.0, 2.0], np.float32)}, run_options(-1))[0]
    except onnxruntime_errors() as error:
        return plain(error)
    # ONNX Runtime falls back to the CPU, with no more than a warning, when a provider's libraries do not load.
    if session.get_providers()[0] != provider.execution_provider:
        return f"{provider.execution_provider} is installed but does not start (driver or CUDA libraries missing)"
    return "" if np.array_equal(answer, [2.0, 4.0]) else "it computes wrong results"


def session_options(threads: int | None) -> Any:
    """Return session options for `threads` threads, for sessions that take turns on the same cores."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    # Within a call, threads that spin between operators save their wake-up; after it they would take the cores from the
    # session whose turn is next. Three members on two cores, tokens/s: 53 so, 41 without spinning, 20 with it alone.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(
    graph: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    packed: tuple[PrepackedWeights, str] | None = None,
    profile: Path | None = None,
) -> Any:
    """Open an `onnxruntime.InferenceSession` of a graph file.

    Args:
        graph: The .onnx file; its external data is looked for beside it, plain or as a .sparse file.
        provider: Where it runs.
        threads: Threads within an operator; physical cores by default.
        packed: Where its weights are kept as the provider's kernels want them, and the digest of its files.
        profile: Let ONNX Runtime's profiler write a trace to a file that begins with this path.

    Raises:
        BundleError: ONNX Runtime cannot load the graph.
    """
    if not graph.is_file():
        raise BundleError(f"there is no graph {graph}", "Export the bundle again.")

    def create(instead: Path | None, entries: Mapping[str, str], output: Path | None) -> Any:
        options = session_options(threads)
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if output is not None:
            options.optimized_model_filepath = str(output)
        if instead is None and (weights := expanded_files(graph)):
            _give_files(options, weights)  # ONNX Runtime copies them: they need not outlive the session's creation
        path = instead or graph
        try:
            return create_session(str(path), provider, options)
        except onnxruntime_errors() as error:
            raise BundleError(
                f"ONNX Runtime cannot load {path} on {provider.name}: "
                + plain(error).removeprefix(f"Load model from {path} failed:"),
                f"Not every graph can be recorded: use the provider {eager(provider).name!r}."
                if provider.captures
                else "The graph is damaged or made for another target; export the bundle again.",
            ) from error

    if packed is None or not provider.packs:
        return create(None, {}, None)
    folder, digest = packed
    return folder.open(digest, create)


def open_bytes(graph: bytes, provider: Provider, *, threads: int | None = None) -> Any:
    """Open an `onnxruntime.InferenceSession` of a graph in memory; exceptions of ONNX Runtime pass through."""
    return create_session(graph, provider, session_options(threads))


def _give_files(options: Any, files: Mapping[str, NDArray[np.uint8]]) -> None:
    """Let a session find external data files in memory: location -> content."""
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        raise EdgemixError(
            f"this ONNX Runtime ({_onnxruntime().__version__}) cannot take weights from memory, as sparse ones must be",
            "Upgrade it: pip install --upgrade onnxruntime (or onnxruntime-gpu)",
        )
    options.add_external_initializers_from_files_in_memory(
        list(files), list(files.values()), [content.nbytes for content in files.values()]
    )


def check_version(least: tuple[int, int], what: str) -> None:
    """Check that ONNX Runtime is recent enough for a feature.

    Raises:
        EdgemixError: It is older.
    """
    version = _onnxruntime().__version__
    if tuple(map(int, version.split(".")[:2])) < least:
        raise EdgemixError(
            f"{what} needs ONNX Runtime {least[0]}.{least[1]} or later, and this is {version}",
            "Upgrade it: pip install --upgrade onnxruntime (or onnxruntime-gpu)",
        )


def exclusive(provider: Provider) -> AbstractContextManager[object]:
    """Return the lock to hold while a provider runs or its memory is used: nothing else may run during a recording."""
    return _RECORDING if provider.captures else _NOTHING


def eager(provider: Provider) -> Provider:
    """Return the row of the same device that records nothing."""
    rows = PROVIDERS.values()
    return next(row for row in rows if row.execution_provider == provider.execution_provider and not row.captures)


def run_options(recording: int) -> Any:
    """Return the run options of a call on a provider that records: the number of its recording, -1 for none."""
    options = _onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(recording))
    return options


def place(array: NDArray[Any], provider: Provider) -> Any:
    """Return an `OrtValue` of the array's values in the provider's memory; on the CPU that is the array's own."""
    with exclusive(provider):
        return _onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), provider.device, 0)


@cache
def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Return all exceptions that ONNX Runtime raises; they share no base class of its own."""
    _onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)  # the last for C++'s bad_alloc


def plain(error: Exception) -> str:
    """Return ONNX Runtime's message on one line, without its code."""
    message = str(error).strip().split("\n", 1)[0]
    if message.startswith("[ONNXRuntimeError]"):
        message = message.split(" : ", 3)[-1]
    return message or type(error).__name__


def create_session(graph: str | bytes, provider: Provider, options: Any) -> Any:
    fallback = PROVIDERS["cpu"]
    rows = [provider] if provider.execution_provider == fallback.execution_provider else [provider, fallback]
    with exclusive(provider):
        return _onnxruntime().InferenceSession(
            graph, options, providers=[(row.execution_provider, dict(row.options)) for row in rows]
        )


@cache
def _onnxruntime() -> Any:
    """Import onnxruntime when it is first needed: it is half of the runtime's import time."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EdgemixError(
            f"ONNX Runtime cannot be imported: {error}",
            "Install it with `pip install 'edgemix[cpu]'`, or `pip install 'edgemix[gpu]'` for CUDA.",
        ) from error
    if "CUDAExecutionProvider" in ort.get_available_providers() and hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it misses; `why_not` finds out by itself
            ort.preload_dlls()  # finds CUDA and cuDNN where pip put them
    return ort
