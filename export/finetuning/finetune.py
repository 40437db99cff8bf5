"""Domain experts: a model fine-tuned on text, as a LoRA adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from edgemix.bundle.stages import stage_key
from edgemix.export.data.text import split
from edgemix.export.finetuning.options import HELD_OUT, Training, TrainingOptions, held_out_windows
from edgemix.export.models.architecture import context_length
from edgemix.export.models.loading import load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import fingerprint, train
from edgemix.export.training.lora import FreshAdapter, attach_adapters, eager_attention
from edgemix.export.training.output_folder import atomic_folder, check_output, exclusive
from edgemix.export.training.qlora import is_in_four_bits, load_base
from edgemix.export.training.token_loss import has_fast_bfloat16, token_loss
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        adapter: The PEFT folder that it wrote.
        steps: Optimiser steps; `tokens` the tokens that they read, repetitions counted; `seconds` the time they took.
        parameters: Number of weights in the adapter.
        training_loss: Running mean over the last steps, nats a token.
        validation_before: Mean loss of the model as it was on the validation text, nats a token; None without such
            text. `validation_after`: with the adapter.
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
    """Fine-tune a model that lies in a folder, a .gguf file or on the hub; see `finetune_model`.

    Args:
        base: The folder or file, relative to the working folder, or the hub id.
        output: As for `finetune_model`, like everything that follows.
        documents: Training text.
        validation: Text to measure the loss on.
        four_bit: Keep the model in 4 bits while the adapter is trained (QLoRA).
        progress: Hears of every step's loss.
        options: See `Training`.
    """
    check_output(output)
    location = locate(base, Path())
    with progress.stage(f"load {location.name}"):
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
    """Train a LoRA adapter on documents and write it as a PEFT folder. `model` comes back as it was, frozen.

    A run that is interrupted leaves a checkpoint beside `output`; the same call takes it up. With a number of steps the
    result is then the same as without the interruption.

    Args:
        model: A causal language model in fp32, or in 4 bits (see `qlora`).
        tokenizer: Its tokenizer.
        output: The adapter's folder; must not be there yet.
        documents: Training text.
        base_name: What the adapter calls its base model; no path of this machine.
        validation: Text to measure the loss on; None keeps `HELD_OUT` of the documents out of training for it.
        progress: Hears of every step's loss.
        options: See `Training`.

    Raises:
        InputError: The output is there already, the model has no linear layer, or there is too little text.
        EdgemixError: The loss is no longer a number, or the disk is full.
    """
    check_output(output)
    training = Training(**options)
    length = min(training.length, context_length(model.config))
    if validation is None:
        documents, validation = split(documents, HELD_OUT, seed=training.seed)
    with progress.stage("tokenise"):
        text = training.windows(documents, tokenizer, length)
        held_out = held_out_windows({base_name: validation}, tokenizer, length)
    key = stage_key(
        base=[base_name, fingerprint(model)], text=hashlib.sha256(text.tobytes()).hexdigest(), training=training
    )
    checkpoint = Checkpoint(output.with_name(f".{output.name}.training"), key)
    fresh = FreshAdapter(training.rank, training.alpha or 2 * training.rank, training.seed)
    with (
        exclusive(output),
        attach_adapters(model, [fresh], recompute=is_in_four_bits(model)) as adapters,
        eager_attention(model, length),
    ):
        device = adapters.device
        loss = token_loss(model, bfloat16=has_fast_bfloat16(device))
        before = _mean_loss(loss, held_out, training.batch, device)
        model.train()
        state = train(
            loss,
            adapters.parameters(0),
            text,
            budget=training.budget,
            batch=training.batch,
            learning_rate=training.learning_rate,
            seed=training.seed,
            checkpoint=checkpoint,
            title=f"{output.name}: fine-tune",
            progress=progress,
        )
        model.eval()
        after = _mean_loss(loss, held_out, training.batch, device)
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


def _mean_loss(
    loss: Callable[[Tensor], Tensor], texts: Sequence[NDArray[np.int64]], batch: int, device: torch.device
) -> float | None:
    """Mean loss a token over texts of equal windows, in nats; None if there are none."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            for start in range(0, len(text), batch):
                ids = torch.from_numpy(text[start : start + batch]).to(device)
                tokens = len(ids) * (ids.shape[1] - 1)
                total += float(loss(ids)) * tokens
                count += tokens
    return total / count if count else None
