"""The teacher's distributions on disk, in shards of windows that are written atomically, so that a killed run resumes.

A token takes about 4 k bytes (6 k if ids need more than 16 bits): log-probabilities are stored in half precision, with
a relative error of at most 1/2048, and normalized when they are read.
"""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
import torch

from edgemix.bundle.stages import stage_key
from edgemix.errors import EdgemixError, storage_errors
from edgemix.export.training.losses import TopK
from edgemix.files import write_atomically
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor

    from edgemix.export.distillation.teacher import Teacher

SHARD = 16
"""Windows per shard: an interruption loses less than one shard."""


class TeacherCache:
    """A teacher's distributions on windows.

    Args:
        folder: The cache's own folder.
        windows: int64 [windows, length].
        teacher: The teacher. Shards of another teacher, `k` or temperature are ignored.
        k: Number of top tokens to keep.
        temperature: Temperature of the distributions.

    Attributes:
        seconds_spent: Seconds that the teacher took for the windows; set by `fill`.
    """

    def __init__(
        self, folder: Path, windows: NDArray[np.int64], teacher: Teacher, *, k: int, temperature: float
    ) -> None:
        self.windows = windows
        self.seconds_spent = 0.0
        self._folder, self._teacher = folder, teacher
        self._k, self._temperature = k, temperature
        self._settings = {"teacher": teacher.key, "k": k, "temperature": temperature, "vocabulary": teacher.vocabulary}

    def fill(
        self,
        *,
        seconds: float | None = None,
        accelerator: Accelerator | None = None,
        title: str = "teacher",
        progress: Progress = NO_PROGRESS,
    ) -> TeacherCache:
        """Compute missing shards, from the first window on.

        Args:
            seconds: Stop when this time has been spent on the existing shards, those of earlier runs included.
            accelerator: Processes that take turns at the shards.
            title: Title of the progress stage.
            progress: Progress callback.

        Returns:
            A cache of the leading windows that are available without a gap: at least one shard.

        Raises:
            EdgemixError: A shard cannot be written, or the teacher fails.
        """
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        shards = -(-len(self.windows) // SHARD)
        with storage_errors(f"writing {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        seconds_spent = 0.0
        with progress.stage(title, len(self.windows)) as task:
            for shard in range(rank, shards, world_size):
                if seconds is not None and seconds_spent >= seconds and shard > rank:
                    break
                found = self.shard_seconds(shard)
                seconds_spent += self.write_shard(shard) if found is None else found
                task.advance(world_size * len(self._indices(shard)))
        if accelerator:
            accelerator.wait_for_everyone()
        available = next((shard for shard in range(shards) if self.shard_seconds(shard) is None), shards)
        filled = copy.copy(self)
        filled.windows = self.windows[: available * SHARD]
        filled.seconds_spent = sum(self.shard_seconds(shard) or 0.0 for shard in range(available)) / world_size
        return filled

    def read(self, indices: NDArray[np.int64]) -> TopK:
        """Read the distributions of windows by index, as rows [len(indices) * (length - 1)].

        Raises:
            EdgemixError: A shard is missing or damaged.
        """
        parts = [self._window(*divmod(int(index), SHARD)) for index in indices]
        ids, logs, tail = (np.concatenate(each) for each in zip(*parts, strict=True))
        events = torch.from_numpy(np.concatenate([logs, tail[:, None]], 1)).float()
        events = events - events.logsumexp(-1, keepdim=True)
        return TopK(torch.from_numpy(ids.astype(np.int64)), events[:, :-1], events[:, -1])

    def tokens(self, indices: NDArray[np.int64]) -> Tensor:
        """Return windows by index: int64 [len(indices), length]."""
        return torch.from_numpy(self.windows[indices])

    def _indices(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.windows)))

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06}.safetensors"

    def _key(self, shard: int) -> str:
        indices = self._indices(shard)
        return stage_key(windows=self.windows[indices.start : indices.stop].tolist(), **self._settings)

    def write_shard(self, shard: int) -> float:
        """Compute and write a shard, and return the seconds that it took."""
        started = time.monotonic()
        indices = self._indices(shard)
        windows = self.windows[indices.start : indices.stop]
        top = self._teacher.top_k(windows, self._k, self._temperature)
        small = self._teacher.vocabulary <= np.iinfo(np.uint16).max + 1
        rows = (len(windows), windows.shape[1] - 1)
        tensors = {
            "ids": top.ids.numpy().astype(np.uint16 if small else np.uint32).reshape(*rows, -1),
            "log_probabilities": _half(top.log_probabilities).reshape(*rows, -1),
            "tail": _half(top.tail).reshape(rows),
        }
        seconds = time.monotonic() - started
        metadata = {"edgemix": json.dumps({"key": self._key(shard), "seconds": seconds})}
        with storage_errors(f"writing {self._path(shard)}"):
            write_atomically(self._path(shard), safetensors.numpy.save(tensors, metadata))
        return seconds

    def shard_seconds(self, shard: int) -> float | None:
        """Return the seconds that a shard took; None if it is missing, damaged, or of other settings."""
        try:
            with safetensors.safe_open(self._path(shard), "numpy") as file:
                written = json.loads((file.metadata() or {})["edgemix"])
            return float(written["seconds"]) if written["key"] == self._key(shard) else None
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _window(self, shard: int, row: int) -> tuple[NDArray[np.integer], NDArray[np.float16], NDArray[np.float16]]:
        try:
            with safetensors.safe_open(self._path(shard), "numpy") as file:
                ids, logs, tail = (file.get_slice(name)[row] for name in ("ids", "log_probabilities", "tail"))
        except (OSError, safetensors.SafetensorError) as error:
            raise EdgemixError(
                f"{self._path(shard)}: cannot be read: {error}", "Start the same command again."
            ) from None
        return ids, logs, tail


def _half(values: Tensor) -> NDArray[np.float16]:
    """Convert to half precision, with its lowest finite index for the logarithm of zero."""
    lowest = float(np.finfo(np.float16).min)
    half: NDArray[np.float16] = values.clamp(min=lowest).half().numpy()
    return half
