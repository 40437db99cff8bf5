"""The teacher's distributions on disk: shards of windows, each written atomically, so that a killed run goes on.

A token takes 4 k bytes and a few (6 k where ids need more than 16 bits): log-probabilities in half precision, which are
off by 1/2048 of themselves at most, and made to sum to one again when they are read.
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

_SHARD = 16
"""Windows of a shard: what an interruption loses is less."""


class TeacherCache:
    """What a teacher says on windows.

    Args:
        folder: Its own.
        windows: int64 [windows, length].
        teacher: Who is asked; its key and the two numbers below decide what an older shard is worth.
        k: Tokens of each distribution that are kept.
        temperature: Of the distributions.

    Attributes:
        seconds_spent: Seconds that the teacher has taken for the windows, as `fill` has found it.
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
        """Ask for what is not there yet, from the first window on.

        Args:
            seconds: Stop when this time has been spent on the existing shards, those of earlier runs included.
            accelerator: Processes that take turns at the shards.
            title: The stage's name for `progress`.
            progress: Hears of the windows.

        Returns:
            A cache of the windows that are there now, from the first on without a gap: one shard's at least.

        Raises:
            EdgemixError: The disk refuses, or the teacher fails.
        """
        place, places = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        shards = -(-len(self.windows) // _SHARD)
        with storage_errors(f"writing {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        seconds_spent = 0.0
        with progress.stage(title, len(self.windows)) as task:
            for shard in range(place, shards, places):
                if seconds is not None and seconds_spent >= seconds and shard > place:
                    break
                found = self._seconds(shard)
                seconds_spent += self._write_shard(shard) if found is None else found
                task.advance(places * len(self._numbers(shard)))
        if accelerator:
            accelerator.wait_for_everyone()
        there = next((shard for shard in range(shards) if self._seconds(shard) is None), shards)
        filled = copy.copy(self)
        filled.windows = self.windows[: there * _SHARD]
        filled.seconds_spent = sum(self._seconds(shard) or 0.0 for shard in range(there)) / places
        return filled

    def read(self, numbers: NDArray[np.int64]) -> TopK:
        """The distributions of some windows, row after row [len(numbers) * (length - 1)].

        Raises:
            EdgemixError: A shard is missing or damaged.
        """
        parts = [self._window(*divmod(int(number), _SHARD)) for number in numbers]
        ids, logs, tail = (np.concatenate(each) for each in zip(*parts, strict=True))
        events = torch.from_numpy(np.concatenate([logs, tail[:, None]], 1)).float()
        events = events - events.logsumexp(-1, keepdim=True)
        return TopK(torch.from_numpy(ids.astype(np.int64)), events[:, :-1], events[:, -1])

    def tokens(self, numbers: NDArray[np.int64]) -> Tensor:
        """The windows [len(numbers), length] themselves."""
        return torch.from_numpy(self.windows[numbers])

    def _numbers(self, shard: int) -> range:
        return range(shard * _SHARD, min((shard + 1) * _SHARD, len(self.windows)))

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06}.safetensors"

    def _key(self, shard: int) -> str:
        numbers = self._numbers(shard)
        return stage_key(windows=self.windows[numbers.start : numbers.stop].tolist(), **self._settings)

    def _write_shard(self, shard: int) -> float:
        """Write a shard; the seconds that it took."""
        started = time.monotonic()
        numbers = self._numbers(shard)
        windows = self.windows[numbers.start : numbers.stop]
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

    def _seconds(self, shard: int) -> float | None:
        """The seconds that a shard took to make; None if it is not there, damaged, or of something else."""
        try:
            with safetensors.safe_open(self._path(shard), "numpy") as file:
                written = json.loads((file.metadata() or {})["edgemix"])
            return float(written["seconds"]) if written["key"] == self._key(shard) else None
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _window(self, shard: int, place: int) -> tuple[NDArray[np.integer], NDArray[np.float16], NDArray[np.float16]]:
        try:
            with safetensors.safe_open(self._path(shard), "numpy") as file:
                ids, logs, tail = (file.get_slice(name)[place] for name in ("ids", "log_probabilities", "tail"))
        except (OSError, safetensors.SafetensorError) as error:
            raise EdgemixError(
                f"{self._path(shard)}: cannot be read: {error}", "Start the same command again."
            ) from None
        return ids, logs, tail


def _half(values: Tensor) -> NDArray[np.float16]:
    """In half precision, with the lowest number that it has for the logarithm of zero."""
    lowest = float(np.finfo(np.float16).min)
    half: NDArray[np.float16] = values.clamp(min=lowest).half().numpy()
    return half
