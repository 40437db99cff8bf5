"""Recovery: what is left of a model learns to say what the whole one said, on text, by their KL divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemix.export.pruning.sparsity import zeros_kept
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
"""At its highest."""


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
    """Train all of `model` but embeddings and head, in place; weights that are zero stay zero.

    Args:
        model: The pruned model, in evaluation mode (as it stays: dropout would only blur what is to be matched).
        teacher: The unpruned one, with the same embeddings and head, on the same device.
        windows: int64 [windows, length], text.
        budget: When to stop.
        learning_rate: At its highest.
        seed: Of the windows' order.
        checkpoint: Where to go on from, and where to keep the state.
        title: The stage's name for `progress`.
        progress: Hears of every step's loss.

    Raises:
        EdgemixError: The loss is no longer a number, or a checkpoint cannot be written.
        KeyboardInterrupt: As it came, once the checkpoint is written.
    """
    trained = _trained(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    try:
        with zeros_kept(model), eager_attention(model, windows.shape[1]):
            return train(
                self_divergence(teacher, model, bfloat16=has_fast_bfloat16(model.device)),
                trained,
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


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters but those of embeddings, which a head may be tied to, and of the head."""
    frozen = {id(each) for module in model.modules() if isinstance(module, torch.nn.Embedding) for each in
              module.parameters()}  # fmt: skip
    frozen |= {id(each) for each in model.get_output_embeddings().parameters()}
    return {name: each for name, each in model.named_parameters() if id(each) not in frozen}
