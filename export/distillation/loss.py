"""What the student hears at a step: the teacher on windows of text, and on windows that the student wrote."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemix.export.distillation.head_loss import distillation_loss
from edgemix.export.distillation.samples import write_windows
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
"""Windows that are measured at once."""
_TRIALS = 4
"""How often a step's time is taken; the shortest counts."""


class Lesson:
    """The loss of a student, by the numbers of windows in a cache.

    Args:
        model: The student.
        cache: The teacher's distributions on text, at the objective's temperature.
        objective: What is minimised on text; on the student's own windows its divergence alone is.
        vocabulary: The tokenizer's.
        teacher: Answers on the student's own windows; None where it writes none.
        samples: Share of windows that it writes in the second half of the budget.
        k: Tokens of the teacher's answers that are kept.
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
        self._on_text = distillation_loss(model, objective, vocabulary, bfloat16=bfloat16)
        alone = dataclasses.replace(objective, alpha=1.0)
        self._on_own = distillation_loss(model, alone, vocabulary, bfloat16=bfloat16)
        self._second_half = False

    def before_step(self, used: float) -> None:
        """Hear what share of the budget is used."""
        self._second_half = used >= 0.5

    def __call__(self, numbers: Tensor) -> Tensor:
        """The mean loss on windows, by their numbers [batch, 1]; some are written anew by the student."""
        device = numbers.device
        chosen = numbers[:, 0].cpu().numpy()
        own = self._count_own(len(chosen))
        total = torch.zeros((), device=device)
        if own < len(chosen):
            ids, teacher = _read(self._cache, chosen[own:], device)
            total = total + self._on_text(ids, teacher) * (1 - own / len(chosen))
        if own and self._teacher is not None:
            ids, teacher = self._write(self._teacher, chosen[:own], device)
            total = total + self._on_own(ids, teacher) * (own / len(chosen))
        return total

    def measure(self, cache: TeacherCache) -> float:
        """The mean loss on all windows of another cache."""
        return mean_loss(self._model, self._on_text, cache)

    def _count_own(self, batch: int) -> int:
        """How many windows of a batch the student writes: on average the share that it should."""
        if not self._second_half or self._teacher is None:
            return 0
        return min(batch, int(self._samples * batch + float(torch.rand(()))))

    def _write(self, teacher: Teacher, numbers: NDArray[np.int64], device: torch.device) -> tuple[Tensor, TopK]:
        text = self._cache.tokens(numbers).to(device)
        ids = write_windows(self._model, text, self._vocabulary, bfloat16=self._bfloat16)
        top = teacher.top_k(ids.cpu().numpy(), self._k, self._temperature)
        return ids, TopK(*(part.to(device) for part in top))


def learning_speed(model: PreTrainedModel, lesson: Lesson, batch: int, length: int) -> float:
    """Tokens a second that a student can learn from; its parameters become trainable, and stay as they are.

    Args:
        model: The student.
        lesson: With `batch` windows at least.
        batch: Windows at once, of `length` tokens.
        length: Likewise.
    """
    numbers, seconds = torch.arange(batch, device=model.device)[:, None], math.inf
    model.requires_grad_()
    with eager_attention(model, length):
        for _ in range(_TRIALS):  # the first ones also make buffers, and another process may take a core for a moment
            started = time.monotonic()
            loss = lesson(numbers)
            loss.backward()
            float(loss)  # waits for a GPU
            seconds = min(seconds, time.monotonic() - started)
    model.zero_grad()
    return batch * length / max(seconds, 1e-6)


def mean_loss(model: PreTrainedModel, loss: Callable[[Tensor, TopK], Tensor], cache: TeacherCache) -> float:
    """The mean of a model's loss over all windows of a cache."""
    total, count = 0.0, len(cache.windows)
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            numbers = np.arange(start, min(start + _BATCH, count))
            total += float(loss(*_read(cache, numbers, model.device))) * len(numbers)
    return total / count


def _read(cache: TeacherCache, numbers: NDArray[np.int64], device: torch.device) -> tuple[Tensor, TopK]:
    ids, top = cache.tokens(numbers), cache.read(numbers)
    return ids.to(device), TopK(*(part.to(device) for part in top))
