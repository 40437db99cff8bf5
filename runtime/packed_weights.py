"""Weights as this machine's kernels want them, beside the bundle: written once, mapped into memory from then on.

When ONNX Runtime opens a graph it lays quantised weights out anew for the processor, in memory that belongs to the
session alone. Saved, that layout is a file that is mapped: it opens faster, needs hardly any memory of its own, can be
dropped by the system and read again, and is there once for all sessions and processes. It takes two to three times the
disk of the weights. Of SmolLM2-135M in int4, 141 MB of a session's memory become 10 MB.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgemix.errors import EdgemixError, storage_errors
from edgemix.runtime.system import installed_version, processor

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger(__name__)

_GRAPH = "model.onnx"
_SMALLEST = 1024
"""Bytes of a tensor that is not in the graph's own file."""


class PackedWeights:
    """A folder with packed graphs, each in one of its own that goes by all that the layout depends on.

    It is trusted: whoever can write there decides what runs.

    Args:
        folder: Made if need be.
        machine: What kernels choose by: version, processor.
    """

    def __init__(self, folder: Path, machine: str) -> None:
        self._folder, self._machine = folder, machine

    @classmethod
    def of_this_machine(cls, folder: Path) -> Self:
        """The folder, for this processor and this ONNX Runtime."""
        here = processor()
        versions = [f"{name} {installed_version(name)}" for name in ("onnxruntime", "onnxruntime-gpu")]
        return cls(folder, "\n".join([*versions, here.name, *here.instruction_sets]))

    def open(self, digest: str, create: Callable[[Path | None, dict[str, str], Path | None], Any]) -> Any:
        """A session of a graph from its packed form, which is made if it is not there.

        Where it cannot be made or read, the session is that of the graph itself.

        Args:
            digest: Of the graph's files.
            create: Opens a session: of a graph in the place of its own, with more entries of the session's
                configuration, and writing the optimised graph to a path.
        """
        name = hashlib.sha256(f"{digest}\n{self._machine}".encode()).hexdigest()[:32]
        packed = self._folder / name
        try:
            if not packed.is_dir():
                self._make(packed, create)
            return create(packed / _GRAPH, {}, None)
        except EdgemixError as error:
            LOG.info("packed weights in %s are not used: %s", self._folder, error)
            shutil.rmtree(packed, ignore_errors=True)
            return create(None, {}, None)

    def _make(self, packed: Path, create: Callable[[Path | None, dict[str, str], Path | None], Any]) -> None:
        with storage_errors(f"writing {packed}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".", dir=self._folder))
        entries = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{_GRAPH}.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST),
        }
        try:
            create(None, entries, made / _GRAPH)
            with storage_errors(f"writing {packed}"):
                if not packed.is_dir():  # another process may have been faster
                    made.rename(packed)
        finally:
            shutil.rmtree(made, ignore_errors=True)
