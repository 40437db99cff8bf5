"""Prepacked weights: weights in the layout of this machine's kernels, written once and mapped into memory from then on.

When ONNX Runtime opens a graph it packs quantized weights anew for the processor, in memory that belongs to the session
alone. Saved, that layout is a file that is mapped: it opens faster, needs hardly any memory of its own, can be dropped
by the system and read again, and exists once for all sessions and processes. It takes two to three times the disk space
of the weights. Of SmolLM2-135M in int4, 141 MB of a session's memory become 10 MB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgemix.errors import EdgemixError, storage_errors
from edgemix.files import sync_folder
from edgemix.runtime.processor import installed_version, processor

if TYPE_CHECKING:
    from collections.abc import Callable

    Create = Callable[[Path | None, dict[str, str], Path | None], Any]

LOG = logging.getLogger(__name__)

_GRAPH = "model.onnx"
_UNFINISHED = ".unfinished-"
_STALE = 24 * 3600
"""Age in seconds of an unfinished file whose writer is taken for dead."""
_SMALLEST = 1024
"""Bytes from which a tensor is stored outside the graph's own file."""


class PrepackedWeights:
    """A folder of packed graphs, each in a folder named after everything that the layout depends on.

    The folder is trusted: write access to it is control over what runs. It must not lie in the bundle, whose files
    are all listed.

    Args:
        folder: Created if needed.
        machine: What kernels are chosen by: ONNX Runtime's version and the processor.
    """

    def __init__(self, folder: Path, machine: str) -> None:
        self._folder, self._machine = folder, machine

    @classmethod
    def of_this_machine(cls, folder: Path) -> Self:
        """Return the folder for this processor and this ONNX Runtime."""
        here = processor()
        versions = [f"{name} {installed_version(name)}" for name in ("onnxruntime", "onnxruntime-gpu")]
        return cls(folder, "\n".join([*versions, here.name, *here.instruction_sets]))

    def open(self, digest: str, create: Create) -> Any:
        """A session of a graph from its packed form, which is made if it is not there.

        Where it cannot be made or read, the session is that of the graph itself.

        Args:
            digest: Of the graph's files.
            create: Opens a session: of a graph in the place of its own, with more entries of the session's
                configuration, and writing the optimized graph to a path.

        Raises:
            BundleError: The graph itself cannot be opened.
        """
        name = hashlib.sha256(f"{digest}\n{self._machine}".encode()).hexdigest()[:32]
        packed = self._folder / name
        try:
            if not packed.is_dir():
                self._make(packed, create)
        except EdgemixError as error:
            LOG.info("weights are not packed: %s", error)
            return create(None, {}, None)
        try:
            return create(packed / _GRAPH, {}, None)
        except EdgemixError as error:
            LOG.info("packed weights are made anew next time: %s", error)
            shutil.rmtree(packed, ignore_errors=True)
            return create(None, {}, None)

    def _make(self, packed: Path, create: Create) -> None:
        with storage_errors(f"writing {packed}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._folder))
        entries = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{_GRAPH}.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST),
        }
        try:
            create(None, entries, made / _GRAPH)
            with storage_errors(f"writing {packed}"):
                made.chmod(0o755)  # other users may map it, too
                for file in made.iterdir():
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
                try:
                    made.rename(packed)
                except OSError:
                    if not packed.is_dir():  # where it is, another process was faster
                        raise
                sync_folder(self._folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Remove the unfinished files of processes that were killed."""
        for folder in self._folder.glob(f"{_UNFINISHED}*"):
            if time.time() - folder.stat().st_mtime > _STALE:
                shutil.rmtree(folder, ignore_errors=True)
