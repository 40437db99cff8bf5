"""The state of a pruning run on disk: the last cut and the recovery after it, from which a stopped run resumes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from edgemix.errors import storage_errors
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.output_folder import seal, sealed
from edgemix.files import sync_folder

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

_RECORD = "edgemix-cut.json"


@dataclass
class PruningState:
    """The state of a pruning run.

    Attributes:
        model: The pruned model, after the cut of `step`; its recovery may not be finished.
        step: Number of the last cut, from 1; 0 before any.
        kept: Index of each remaining layer in the original model.
        recovery_steps, recovery_seconds: Totals over all finished recoveries.
    """

    model: PreTrainedModel
    step: int
    kept: list[int]
    recovery_steps: int = 0
    recovery_seconds: float = 0.0


class _Record(msgspec.Struct, frozen=True):
    """Metadata stored beside a cut's weights."""

    key: str
    kept: list[int]
    recovery_steps: int
    recovery_seconds: float


class Cuts:
    """The last cut of a run in a folder, either complete or absent.

    Args:
        folder: Used by this run only; created on demand.
        key: Digest of everything that the run depends on; a cut with another key is ignored.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def save(self, state: PruningState) -> None:
        """Write a cut, then delete the one before it.

        Raises:
            EdgemixError: The cut cannot be written.
        """
        folder, partial = self._cut(state.step), self._folder / "partial"
        with storage_errors(f"writing {folder}"):
            for path in (partial, folder):
                shutil.rmtree(path, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            state.model.save_pretrained(partial)
            record = _Record(self._key, state.kept, state.recovery_steps, state.recovery_seconds)
            (partial / _RECORD).write_bytes(msgspec.json.encode(record))
            seal(partial)
            partial.rename(folder)
            sync_folder(self._folder)
            shutil.rmtree(self._cut(state.step - 1), ignore_errors=True)
            self._recovery(state.step - 1).unlink(missing_ok=True)

    def last(self, like: PreTrainedModel, steps: int) -> PruningState | None:
        """Load the last cut with this run's key; None if there is none.

        Args:
            like: The original model, whose class and device the loaded model gets.
            steps: Highest number of a cut.
        """
        for step in range(steps, 0, -1):
            folder = self._cut(step)
            try:
                record = msgspec.json.decode((folder / _RECORD).read_bytes(), type=_Record)
            except (OSError, ValueError):
                continue
            if record.key == self._key and sealed(folder):
                model = type(like).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
                model = model.to(like.device).eval().requires_grad_(False)
                return PruningState(model, step, record.kept, record.recovery_steps, record.recovery_seconds)
        return None

    def checkpoint(self, step: int) -> Checkpoint:
        """Return the checkpoint of the recovery after a cut."""
        return Checkpoint(self._recovery(step), self._key)

    def _cut(self, step: int) -> Path:
        return self._folder / f"cut-{step}"

    def _recovery(self, step: int) -> Path:
        return self._folder / f"recovery-{step}"
