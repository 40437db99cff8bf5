"""Where a pruning stands, on disk: the last cut and the recovery after it, which a stopped run takes up."""

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
class Stand:
    """Where a pruning stands.

    Attributes:
        model: What is left; the cut of `step` is made, its recovery may be under way.
        step: Of the last cut, from 1; 0 before any.
        kept: Of each layer, the index in the model as it was.
        recovery_steps, recovery_seconds: Over all finished recoveries.
    """

    model: PreTrainedModel
    step: int
    kept: list[int]
    recovery_steps: int = 0
    recovery_seconds: float = 0.0


class _Record(msgspec.Struct, frozen=True):
    """What lies beside a cut's weights."""

    key: str
    kept: list[int]
    recovery_steps: int
    recovery_seconds: float


class Cuts:
    """The last cut of a run in a folder, whole or not there at all.

    Args:
        folder: For this run alone; made when it is needed.
        key: Digest of everything that the run depends on; a cut with another key is not taken up.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def keep(self, stand: Stand) -> None:
        """Write a cut in the place of the one before it.

        Raises:
            EdgemixError: The disk refuses.
        """
        place, partial = self._place(stand.step), self._folder / "partial"
        with storage_errors(f"writing {place}"):
            for path in (partial, place):
                shutil.rmtree(path, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            stand.model.save_pretrained(partial)
            record = _Record(self._key, stand.kept, stand.recovery_steps, stand.recovery_seconds)
            (partial / _RECORD).write_bytes(msgspec.json.encode(record))
            seal(partial)
            partial.rename(place)
            sync_folder(self._folder)
            shutil.rmtree(self._place(stand.step - 1), ignore_errors=True)
            self._recovery(stand.step - 1).unlink(missing_ok=True)

    def last(self, like: PreTrainedModel, steps: int) -> Stand | None:
        """The last cut of this very run, on the device of `like`, a model of its class; None if there is none.

        Args:
            like: The model that is pruned.
            steps: The most that there may be.
        """
        for step in range(steps, 0, -1):
            place = self._place(step)
            try:
                record = msgspec.json.decode((place / _RECORD).read_bytes(), type=_Record)
            except (OSError, ValueError):
                continue
            if record.key == self._key and sealed(place):
                model = type(like).from_pretrained(place, dtype=torch.float32, local_files_only=True)
                model = model.to(like.device).eval().requires_grad_(False)
                return Stand(model, step, record.kept, record.recovery_steps, record.recovery_seconds)
        return None

    def checkpoint(self, step: int) -> Checkpoint:
        """Of the recovery after a cut."""
        return Checkpoint(self._recovery(step), self._key)

    def _place(self, step: int) -> Path:
        return self._folder / f"cut-{step}"

    def _recovery(self, step: int) -> Path:
        return self._folder / f"recovery-{step}"
