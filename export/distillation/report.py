"""The results of a distillation."""

from __future__ import annotations

import msgspec


class DistillationReport(msgspec.Struct, frozen=True):
    """The results of a distillation.

    Attributes:
        parameters: Number of the student's weights.
        layers: Number of the student's layers.
        decoding: Estimated decoding time as a fraction of the starting member's, each in its format; None for a student
            with random initial weights.
        weights: Weights by member name of the mixture that was distilled.
        teacher_tokens: Tokens that the teacher evaluated.
        teacher_seconds: Time that the teacher took.
        steps: Optimizer steps.
        tokens: Tokens read, including repetitions.
        seconds: Training time.
        training_loss: Running mean over the last steps.
        held_out_before: Loss on held-out text before the first step; None if there is too little text.
        held_out: Loss on held-out text with the best weights, which were kept.
    """

    parameters: int
    layers: int
    decoding: float | None
    weights: dict[str, float]
    teacher_tokens: int
    teacher_seconds: float
    steps: int
    tokens: int
    seconds: float
    training_loss: float
    held_out_before: float | None
    held_out: float | None
