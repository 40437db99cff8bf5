"""Loading time and memory, measured in a new process each time.

    python -m edgemix.runtime.profiling.loading REQUEST

is such a process: it loads what the request (JSON) names, generates a few tokens, and prints the figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.bundle.paths import resolve
from edgemix.bundle.reader import read_manifest
from edgemix.errors import EdgemixError
from edgemix.results.profile import Loading
from edgemix.runtime.profiling.timing import quantiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemix.bundle.manifest import Manifest
    from edgemix.results.profile import Quantiles

TOKENS = 16
"""Tokens that are generated after loading, for the peak of memory."""
PROMPT = "The first sentence of a text that has yet to be written"
_CLOSE = 0.25
_MOSTLY = 0.5
"""Share of the files that must come from the disk for the file cache to have been cold."""


class LoadRequest(msgspec.Struct, frozen=True):
    """What to load: a member or the student by name, or everything for an empty name."""

    bundle: str
    provider: str
    threads: int
    name: str = ""


class Loaded(msgspec.Struct, frozen=True):
    """One process's figures. `disk` is the bytes read from disk while loading; None where the system does not count."""

    seconds: float
    resident: int
    peak: int
    disk: int | None = None


class Loads:
    """Loads of one bundle, or one graph of it, cold and warm.

    Args:
        request: What is loaded.
        manifest: The bundle's.

    Attributes:
        trouble: Why there are no cold loads; empty while they work.
        seconds: Duration of the last one, with its process.
    """

    def __init__(self, request: LoadRequest, manifest: Manifest) -> None:
        self._request = request
        self.files = files_of(manifest, request.name)
        self.bytes = sum(manifest.files[file].size for file in self.files)
        self._seen: dict[bool, list[Loaded]] = {True: [], False: []}
        self.trouble = ""
        self.seconds = 0.0

    def take(self, *, cold: bool) -> None:
        """Load once more.

        Raises:
            EdgemixError: The process failed.
        """
        if cold and (self.trouble or not drop_from_cache(self._paths())):
            self.trouble = self.trouble or "this system has no way to drop files from its cache"
            return
        begun = time.perf_counter()
        loaded = _in_a_process(self._request)
        self.seconds = time.perf_counter() - begun
        if cold and loaded.disk is not None and loaded.disk < _MOSTLY * self.bytes:
            self.trouble = "the files stayed in the file cache (others use them, or it is not this system's own)"
        else:
            self._seen[cold].append(loaded)

    def loading(self) -> Loading | None:
        """Return the figures; None where nothing was loaded warm."""
        warm, cold = self._seen[False], self._seen[True]
        if not warm:
            return None
        last = max((*warm, *cold), key=lambda loaded: loaded.peak)
        return Loading(
            warm=_seconds(warm),
            resident=int(sorted(each.resident for each in warm)[len(warm) // 2]),
            peak=last.peak,
            files=self.bytes,
            cold=_seconds(cold) if cold else None,
        )

    def _paths(self) -> Iterable[Path]:
        return (resolve(Path(self._request.bundle), file) for file in self.files)


def _seconds(loads: Sequence[Loaded]) -> Quantiles:
    """Return quantiles of a few loads; they are stable if they are close to each other."""
    seconds = [loaded.seconds for loaded in loads]
    close = max(seconds) - min(seconds) <= _CLOSE * min(seconds)
    return quantiles(seconds, stable=len(seconds) > 1 and close)


def files_of(manifest: Manifest, name: str = "") -> tuple[str, ...]:
    """Return the files that a member's or the student's whole graph needs; all of the bundle for an empty name."""
    if not name:
        return tuple(manifest.files)
    entry = next(entry for entry in manifest.graphs if entry.name == name)
    folder, draft = f"{entry.graph.rpartition('/')[0]}/", entry.draft
    others = () if draft is None else (draft.graph, draft.tokens)
    return tuple(file for file in manifest.files if file.startswith(folder) and file not in others)


def drop_from_cache(paths: Iterable[Path]) -> bool:
    """Drop files from the system's file cache; return whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _in_a_process(request: LoadRequest) -> Loaded:
    command = [sys.executable, "-m", "edgemix.runtime.profiling.loading", msgspec.json.encode(request).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, trouble = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = trouble.decode(errors="replace").strip().splitlines()
        raise EdgemixError(f"loading {request.bundle} in a process of its own failed: {lines[-1] if lines else ''}")
    return msgspec.json.decode(output, type=Loaded)


def _load(request: LoadRequest) -> Loaded:
    import onnxruntime  # noqa: F401 - importing it is not loading
    import psutil

    from edgemix.runtime import Mixture

    process, bundle = psutil.Process(), Path(request.bundle)
    manifest = read_manifest(bundle)
    held, read, begun = process.memory_info().rss, _disk(process), time.perf_counter()
    entry = next((entry for entry in manifest.graphs if entry.name == request.name), None)
    with Mixture.assemble(
        bundle, manifest.alone(entry) if entry else manifest, request.provider, request.threads, drafts=entry is None
    ) as mixture:
        seconds, resident, disk = time.perf_counter() - begun, process.memory_info().rss - held, _disk(process)
        mixture.generate(PROMPT, max_new_tokens=TOKENS)
    return Loaded(seconds, max(0, resident), _peak(process), None if disk is None or read is None else disk - read)


def _disk(process: Any) -> int | None:
    """Return the bytes that the process has read from disk; None where the system does not count them."""
    try:
        return int(process.io_counters().read_bytes)
    except (AttributeError, OSError):
        return None


def _peak(process: Any) -> int:
    """Return the peak resident memory of this process in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(process.memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def main() -> None:
    """Serve one request from the command line."""
    loaded = _load(msgspec.json.decode(sys.argv[1], type=LoadRequest))
    sys.stdout.write(msgspec.json.encode(loaded).decode())


if __name__ == "__main__":
    main()
