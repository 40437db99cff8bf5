"""Domain experts: LoRA adapters (Hu et al., arXiv 2106.09685) on all linear projections of a language model."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
import peft
import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError, storage_errors
from edgemix.export.architecture import context_length
from edgemix.export.checkpoint import Checkpoint
from edgemix.export.members import load_model, load_tokenizer, locate
from edgemix.export.text import split, windows
from edgemix.export.token_loss import bfloat16_pays, token_loss
from edgemix.export.training import Budget, fingerprint, train
from edgemix.progress import SILENT, Progress
from edgemix.staging import Lock, stage_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_STEPS = 200
HELD_OUT = 0.05
"""Share of the text that is kept for validation where no validation text is given."""

_MOST_TOKENS = 5_000_000
_VALIDATION_TOKENS = 4_096
_SHORT = 512
"""Longest windows for which attention's scores, of size length x length, are kept as they are."""


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


class FinetuneOptions(TypedDict, total=False):
    """The options of `finetune_model` that `finetune` hands on."""

    validation: Sequence[str] | None
    rank: int
    alpha: float | None
    steps: int | None
    minutes: float | None
    batch: int
    length: int
    learning_rate: float
    seed: int


def finetune(
    base: str,
    output: Path,
    documents: Sequence[str],
    *,
    progress: Progress = SILENT,
    **options: Unpack[FinetuneOptions],
) -> FinetuneReport:
    """Fine-tune a model that lies in a folder, a .gguf file or on the hub; see `finetune_model`.

    Args:
        base: The folder or file, relative to the working folder, or the hub id.
        output: As for `finetune_model`, like everything that follows.
        documents: Training text.
        progress: Hears of every step's loss.
        options: See `FinetuneOptions`.
    """
    _prepare(output)
    location = locate(base, Path())
    with progress.stage(f"load {location.name}"):
        model, tokenizer = load_model(location), load_tokenizer(location)
    return finetune_model(model, tokenizer, output, documents, base_name=location.name, progress=progress, **options)


def finetune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    documents: Sequence[str],
    *,
    base_name: str,
    validation: Sequence[str] | None = None,
    rank: int = 16,
    alpha: float | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch: int = 8,
    length: int = 256,
    learning_rate: float = 5e-4,
    seed: int = 0,
    progress: Progress = SILENT,
) -> FinetuneReport:
    """Train a LoRA adapter on documents and write it as a PEFT folder. `model` comes back as it was, frozen.

    A run that is interrupted leaves a checkpoint beside `output`; the same call takes it up. With a number of steps the
    result is then the same as without the interruption.

    Args:
        model: A causal language model in fp32.
        tokenizer: Its tokenizer.
        output: The adapter's folder; must not be there yet.
        documents: Training text.
        base_name: What the adapter calls its base model; no path of this machine.
        validation: Text to measure the loss on; None keeps `HELD_OUT` of the documents out of training for it.
        rank: Rank of each update.
        alpha: The updates are scaled by alpha / rank; twice the rank by default.
        steps: Optimiser steps; `DEFAULT_STEPS` if `minutes` is not given either.
        minutes: Stop after so long (time spent before an interruption counts).
        batch: Windows a step, of `length` tokens each.
        length: Tokens a window, at most the model's context.
        learning_rate: At its highest; it rises, then falls to zero with the steps or minutes used.
        seed: Of initialisation, the order of the text and dropout.
        progress: Hears of every step's loss.

    Raises:
        InputError: The output is there already, the model has no linear layer, or there is too little text.
        EdgemixError: The loss is no longer a number, or the disk is full.
    """
    _prepare(output)
    budget = Budget(DEFAULT_STEPS if steps is None and minutes is None else steps, minutes and minutes * 60)
    length = min(length, context_length(model.config))
    if validation is None:
        documents, validation = split(documents, HELD_OUT, seed=seed)
    needed = min(_MOST_TOKENS, (budget.steps or _MOST_TOKENS) * batch * length)
    with progress.stage("tokenise"):
        text = np.array(windows(documents, tokenizer, length, max_tokens=needed, seed=seed), np.int64)
        held_out = np.empty((0, length), np.int64)
        if validation:
            held_out = np.array(windows(validation, tokenizer, length, max_tokens=_VALIDATION_TOKENS), np.int64)
    settings = {
        "base": [base_name, fingerprint(model)],
        "text": hashlib.sha256(text.tobytes()).hexdigest(),
        "budget": budget,
        "lora": [rank, alpha],
        "training": [batch, learning_rate, seed],
    }
    checkpoint = Checkpoint(output.with_name(f".{output.name}.training"), stage_key(**settings))
    with _alone(output), _adapted(model, rank, alpha or 2 * rank, seed) as adapted, _fast_attention(model, length):
        device = adapted.device
        loss = token_loss(model, bfloat16=bfloat16_pays(device))
        before = _mean_loss(loss, held_out, batch, device)
        model.train()
        parameters = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
        state = train(
            loss,
            parameters,
            text,
            budget=budget,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            checkpoint=checkpoint,
            title=f"{output.name}: fine-tune",
            progress=progress,
        )
        model.eval()
        after = _mean_loss(loss, held_out, batch, device)
        _write_adapter(adapted, base_name, output)
        checkpoint.remove()
    return FinetuneReport(
        adapter=output,
        steps=state.steps,
        tokens=state.steps * batch * text.shape[1],
        seconds=state.seconds,
        parameters=sum(each.numel() for each in parameters.values()),
        training_loss=state.loss,
        validation_before=before,
        validation_after=after,
    )


@contextmanager
def _adapted(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> Iterator[peft.PeftModel]:
    """The model with fresh LoRA layers, on the GPU if there is one; taken out again afterwards."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    device = model.device
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model.requires_grad_(requires_grad=False), config)
        except ValueError as error:
            raise InputError(f"this model has no linear layer for an adapter: {error}") from error
    try:
        yield adapted.to("cuda" if torch.cuda.is_available() else device)
    finally:
        adapted.unload()
        model.to(device).eval()


@contextmanager
def _fast_attention(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Plain products: with them a step of short windows takes a seventh less time on CPUs than with torch's fused
    attention, whose backward pass is slow there.
    """
    before = model.config._attn_implementation
    if model.device.type != "cpu" or length > _SHORT:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _mean_loss(
    loss: Callable[[Tensor], Tensor], text: NDArray[np.int64], batch: int, device: torch.device
) -> float | None:
    """Mean loss a token over windows of one length, in nats; None if there are none."""
    if not len(text):
        return None
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(text), batch):
            ids = torch.from_numpy(text[start : start + batch]).to(device)
            total += float(loss(ids)) * len(ids)
    return total / len(text)


def _prepare(output: Path) -> None:
    """Refuse before any work what would destroy something after it, and make the folder that `output` goes in.

    Raises:
        InputError: The output is there already, or its folder cannot be made.
    """
    with storage_errors(f"making a folder for {output}"):
        if output.exists():
            raise InputError(f"{output}: is there already", "Choose another folder, or remove it.")
        output.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep a second run away from the same output, whose checkpoints it would overwrite.

    Raises:
        InputError: Another run is at it, or the folder cannot be written.
    """
    path = output.with_name(f".{output.name}.lock")
    lock = Lock(path)
    with storage_errors(f"writing beside {output}"):
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _write_adapter(adapted: peft.PeftModel, base_name: str, output: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors beside `output` and move them there in one step."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    # Without the argument, peft looks the base model up on the hub.
    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = {name: each.detach().cpu().contiguous() for name, each in weights.items()}
    staging = output.with_name(f".{output.name}.partial")
    with storage_errors(f"writing {output}"):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        config.save_pretrained(str(staging))
        (staging / "adapter_model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        staging.rename(output)
