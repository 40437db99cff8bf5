"""Recovery: train a pruned model to match the original one by their KL divergence on text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemix.export.pruning.sparsity import preserve_zeros
from edgemix.export.training.loop import TrainingBudget, train
from edgemix.export.training.lora import eager_attention
from edgemix.export.training.self_divergence import self_divergence
from edgemix.export.training.token_loss import has_fast_bfloat16
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.training.checkpoints import Checkpoint, TrainingState

BATCH = 8
LEARNING_RATE = 2e-4
"""Peak learning rate."""


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: NDArray[np.int64],
    *,
    budget: TrainingBudget,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    title: str = "recover",
    progress: Progress = NO_PROGRESS,
) -> TrainingState:
    """Train all weights of `model` except embeddings and head, in place; weights that are zero stay zero.

    Args:
        model: The pruned model. It stays in evaluation mode, as dropout would add noise to the targets.
        teacher: The unpruned model, with the same embeddings and head, on the same device.
        windows: Text as token ids, int64 [windows, length].
        budget: When to stop.
        learning_rate: Peak learning rate.
        seed: Seed of the windows' order.
        checkpoint: Checkpoint to resume from and to write.
        title: Title of the progress stage.
        progress: Progress callback.

    Raises:
        EdgemixError: The loss is not finite, or a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; the checkpoint has been written.
    """
    trainable = _trainable(model)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    try:
        with preserve_zeros(model), eager_attention(model, windows.shape[1]):
            return train(
                self_divergence(teacher, model, bfloat16=has_fast_bfloat16(model.device)),
                trainable,
                windows,
                budget=budget,
                batch=min(BATCH, len(windows)),
                learning_rate=learning_rate,
                seed=seed,
                checkpoint=checkpoint,
                title=title,
                progress=progress,
            )
    finally:
        model.requires_grad_(False)


def _trainable(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all parameters except those of the embeddings, which a head may be tied to, and of the head."""
    frozen = {id(each) for module in model.modules() if isinstance(module, torch.nn.Embedding) for each in
              module.parameters()}  # fmt: skip
    frozen |= {id(each) for each in model.get_output_embeddings().parameters()}
    return {name: each for name, each in model.named_parameters() if id(each) not in frozen}
