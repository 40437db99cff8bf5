"""Domain experts: fine-tune a model on text as a LoRA adapter."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from edgemix.bundle.stages import stage_key
from edgemix.export.data.text import split
from edgemix.export.finetuning.options import HELD_OUT, TrainingOptions, TrainingSettings, held_out_windows
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.architecture import context_length
from edgemix.export.models.loading import load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.training.checkpoints import Checkpoint, TrainingState
from edgemix.export.training.loop import fingerprint, train
from edgemix.export.training.lora import Adapters, FreshAdapter, attach_adapters, eager_attention, frozen_in_bfloat16
from edgemix.export.training.output_folder import atomic_folder, check_output, exclusive
from edgemix.export.training.qlora import is_in_four_bits, load_base
from edgemix.export.training.token_loss import has_fast_bfloat16, token_loss
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FinetuneReport:
    """The results of fine-tuning one model.

    Attributes:
        adapter: The PEFT folder that was written.
        steps: Optimizer steps.
        tokens: Tokens read, including repetitions.
        seconds: Training time.
        parameters: Number of weights in the adapter.
        training_loss: Running mean over the last steps, in nats per token.
        validation_before: Mean loss of the base model on the validation text, in nats per token; None without text.
        validation_after: Mean loss with the adapter.
    """

    adapter: Path
    steps: int
    tokens: int
    seconds: float
    parameters: int
    training_loss: float
    validation_before: float | None
    validation_after: float | None


def finetune(
    base: str,
    output: Path,
    documents: Sequence[str],
    *,
    validation: Sequence[str] | None = None,
    four_bit: bool = False,
    progress: Progress = NO_PROGRESS,
    **options: Unpack[TrainingOptions],
) -> FinetuneReport:
    """Fine-tune a model from a folder, a .gguf file or the hub; see `finetune_model`.

    Args:
        base: The folder or file, relative to the working folder, or the hub id.
        output: The adapter's folder; must not exist yet.
        documents: Training text.
        validation: Text to measure the loss on.
        four_bit: Keep the model in 4 bits while the adapter is trained (QLoRA).
        progress: Progress callback.
        options: See `TrainingSettings`.
    """
    check_output(output)
    location = locate(base, Path())
    with progress.stage(f"load {location.name}"), library_warnings(progress):
        model = load_base(location, four_bit=four_bit, progress=progress)
        tokenizer = load_tokenizer(location)
    return finetune_model(
        model,
        tokenizer,
        output,
        documents,
        base_name=location.name,
        validation=validation,
        progress=progress,
        **options,
    )


def finetune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    documents: Sequence[str],
    *,
    base_name: str,
    validation: Sequence[str] | None = None,
    progress: Progress = NO_PROGRESS,
    **options: Unpack[TrainingOptions],
) -> FinetuneReport:
    """Train a LoRA adapter on documents and write it as a PEFT folder. `model` is restored and frozen.

    An interrupted run leaves a checkpoint beside `output`; the same call resumes it. With a number of steps, the result
    is the same as without the interruption.

    Args:
        model: A causal language model in fp32, or in 4 bits (see `qlora`).
        tokenizer: Its tokenizer.
        output: The adapter's folder; must not exist yet.
        documents: Training text.
        base_name: Base model name to record in the adapter; never a local path.
        validation: Text to measure the loss on; None holds out the fraction `HELD_OUT` of the documents.
        progress: Progress callback.
        options: See `TrainingSettings`.

    Raises:
        InputError: The output exists already, the model has no linear layer, or there is too little text.
        EdgemixError: The loss is not finite, or the disk is full.
    """
    check_output(output)
    training = TrainingSettings(**options)
    length = min(training.length, context_length(model.config))
    if validation is None:
        documents, validation = split(documents, HELD_OUT, seed=training.seed)
    with progress.stage("tokenize"):
        text = training.windows(documents, tokenizer, length)
        held_out = held_out_windows({base_name: validation}, tokenizer, length)
    checkpoint, title = _checkpoint(output, base_name, model, text, training), f"{output.name}: fine-tune"
    with exclusive(output), _trainable(model, training, length) as (adapters, loss):
        before = _mean_loss(loss, held_out, training.batch, adapters.device)
        state = _fit(
            model, loss, adapters.parameters(0), text, training, checkpoint=checkpoint, title=title, progress=progress
        )
        after = _mean_loss(loss, held_out, training.batch, adapters.device)
        with atomic_folder(output) as folder:
            adapters.write(0, base_name, folder)
        checkpoint.remove()
    return FinetuneReport(
        adapter=output,
        steps=state.steps,
        tokens=state.steps * training.batch * text.shape[1],
        seconds=state.seconds,
        parameters=sum(each.numel() for each in adapters.parameters(0).values()),
        training_loss=state.loss,
        validation_before=before,
        validation_after=after,
    )


def _checkpoint(
    output: Path, base_name: str, model: PreTrainedModel, text: NDArray[np.int64], training: TrainingSettings
) -> Checkpoint:
    """Return the checkpoint beside `output`, which is of the same base, text and settings or ignored."""
    digest = hashlib.sha256(text.tobytes()).hexdigest()
    key = stage_key(base=[base_name, fingerprint(model)], text=digest, training=training)
    return Checkpoint(output.with_name(f".{output.name}.training"), key)


def _fit(
    model: PreTrainedModel,
    loss: Callable[[Tensor], Tensor],
    parameters: Mapping[str, Tensor],
    text: NDArray[np.int64],
    training: TrainingSettings,
    *,
    checkpoint: Checkpoint,
    title: str,
    progress: Progress,
) -> TrainingState:
    """Train an adapter's parameters with the model in training mode, in which dropout is active."""
    model.train()
    state = train(
        loss,
        parameters,
        text,
        budget=training.budget,
        batch=training.batch,
        learning_rate=training.learning_rate,
        seed=training.seed,
        checkpoint=checkpoint,
        title=title,
        progress=progress,
    )
    model.eval()
    return state


@contextmanager
def _trainable(
    model: PreTrainedModel, training: TrainingSettings, length: int
) -> Iterator[tuple[Adapters, Callable[[Tensor], Tensor]]]:
    """Attach a fresh adapter to a model, and give it with the loss of windows of at most `length` tokens."""
    fresh = FreshAdapter(training.rank, training.alpha or 2 * training.rank, training.seed)
    with (
        attach_adapters(model, [fresh], recompute=is_in_four_bits(model)) as adapters,
        eager_attention(model, length),
    ):
        bfloat16 = has_fast_bfloat16(adapters.device)
        loss = token_loss(model, bfloat16=bfloat16)  # first: it reads the head while the model is in fp32
        with frozen_in_bfloat16(model, enabled=bfloat16):
            yield adapters, loss


def _mean_loss(
    loss: Callable[[Tensor], Tensor], texts: Sequence[NDArray[np.int64]], batch: int, device: torch.device
) -> float | None:
    """Return the mean loss over texts, each int64 [windows, length], in nats per token; None without texts."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            for start in range(0, len(text), batch):
                ids = torch.from_numpy(text[start : start + batch]).to(device)
                tokens = len(ids) * (ids.shape[1] - 1)
                total += float(loss(ids)) * tokens
                count += tokens
    return total / count if count else None
