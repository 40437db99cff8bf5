"""The distillation loss of a training step, on windows of text and on windows that the student generated."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemix.export.distillation.head_loss import objective_loss
from edgemix.export.distillation.samples import generate_windows
from edgemix.export.training.lora import eager_attention
from edgemix.export.training.losses import TopK

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.distillation.teacher import Teacher
    from edgemix.export.distillation.teacher_cache import TeacherCache
    from edgemix.export.training.losses import Objective

_BATCH = 4
"""Windows per forward pass when measuring a loss."""
_REPETITIONS = 4
"""Number of times a step is timed; the shortest counts."""


class DistillationLoss:
    """A student's loss as a function of window indices in a teacher cache.

    Args:
        model: The student.
        cache: The teacher's distributions on text, at the objective's temperature.
        objective: The objective on text; on generated windows, only its divergence is used.
        vocabulary: Size of the tokenizer's vocabulary.
        teacher: Evaluates windows that the student generates; None if it generates none.
        samples: Fraction of windows that the student generates in the second half of the budget.
        k: Top tokens of the teacher's distributions on generated windows.
        bfloat16: Run matrix products in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: TeacherCache,
        objective: Objective,
        vocabulary: int,
        *,
        teacher: Teacher | None = None,
        samples: float = 0.0,
        k: int = 64,
        bfloat16: bool = False,
    ) -> None:
        self._model, self._cache, self._teacher = model, cache, teacher
        self._samples, self._k, self._temperature = samples, k, objective.temperature
        self._vocabulary, self._bfloat16 = vocabulary, bfloat16
        self._on_text = objective_loss(model, objective, vocabulary, bfloat16=bfloat16)
        divergence = dataclasses.replace(objective, alpha=1.0)
        self._on_samples = objective_loss(model, divergence, vocabulary, bfloat16=bfloat16)
        self._second_half = False

    def before_step(self, used: float) -> None:
        """Set the fraction of the budget that is used."""
        self._second_half = used >= 0.5

    def __call__(self, windows: Tensor) -> Tensor:
        """Return the mean loss on windows by their indices [batch, 1]; the student regenerates some of them."""
        device = windows.device
        indices = windows[:, 0].cpu().numpy()
        samples = self._sample_count(len(indices))
        total = torch.zeros((), device=device)
        if samples < len(indices):
            ids, teacher = _read(self._cache, indices[samples:], device)
            total = total + self._on_text(ids, teacher) * (1 - samples / len(indices))
        if samples and self._teacher is not None:
            ids, teacher = self._generate(self._teacher, indices[:samples], device)
            total = total + self._on_samples(ids, teacher) * (samples / len(indices))
        return total

    def measure(self, cache: TeacherCache) -> float:
        """Return the mean loss on all windows of another cache."""
        return mean_loss(self._model, self._on_text, cache)

    def _sample_count(self, batch: int) -> int:
        """Draw the number of a batch's windows that the student generates: `samples * batch` on average."""
        if not self._second_half or self._teacher is None:
            return 0
        return min(batch, int(self._samples * batch + float(torch.rand(()))))

    def _generate(self, teacher: Teacher, indices: NDArray[np.int64], device: torch.device) -> tuple[Tensor, TopK]:
        text = self._cache.tokens(indices).to(device)
        ids = generate_windows(self._model, text, self._vocabulary, bfloat16=self._bfloat16)
        top = teacher.top_k(ids.cpu().numpy(), self._k, self._temperature)
        return ids, TopK(*(part.to(device) for part in top))


def training_speed(model: PreTrainedModel, loss: DistillationLoss, batch: int, length: int) -> float:
    """Measure the speed of a student's training, in tokens per second. Its parameters become trainable, but keep their
    values.

    Args:
        model: The student.
        loss: Its loss, with at least `batch` windows.
        batch: Windows per step.
        length: Tokens per window.
    """
    indices, seconds = torch.arange(batch, device=model.device)[:, None], math.inf
    model.requires_grad_()
    with eager_attention(model, length):
        for _ in range(_REPETITIONS):  # the first ones also allocate buffers, and other processes may take a core
            started = time.monotonic()
            value = loss(indices)
            value.backward()
            float(value)  # waits for a GPU
            seconds = min(seconds, time.monotonic() - started)
    model.zero_grad()
    return batch * length / max(seconds, 1e-6)


def mean_loss(model: PreTrainedModel, loss: Callable[[Tensor, TopK], Tensor], cache: TeacherCache) -> float:
    """Return the mean of a model's loss over all windows of a cache."""
    total, count = 0.0, len(cache.windows)
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            indices = np.arange(start, min(start + _BATCH, count))
            total += float(loss(*_read(cache, indices, model.device))) * len(indices)
    return total / count


def _read(cache: TeacherCache, indices: NDArray[np.int64], device: torch.device) -> tuple[Tensor, TopK]:
    ids, top = cache.tokens(indices), cache.read(indices)
    return ids.to(device), TopK(*(part.to(device) for part in top))
