"""Train small language models from scratch in seconds: members for trying things out without downloaded weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edgemix.bundle.stages import stage_key
from edgemix.export.data.text import windows
from edgemix.export.models.save import save_member
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import TrainingBudget, fingerprint, train
from edgemix.export.training.token_loss import token_loss
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
VOCABULARY = 512
CONTEXT = 512

_BATCH, _LENGTH = 16, 64


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCABULARY` tokens; the same text gives the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, model_max_length=CONTEXT)


def train_member(
    output: Path,
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: Path | None = None,
    steps: int = 150,
    learning_rate: float = 4e-3,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Train all weights of a small Llama on documents and save it with its tokenizer as a Hugging Face folder.

    An interrupted run leaves a checkpoint beside `output`, from which the same call resumes.

    Args:
        output: The folder to write; must not exist yet.
        documents: Training text.
        tokenizer: The tokenizer that the mixture's members share.
        start: A member to continue training from; None starts from random weights.
        steps: Optimizer steps of `_BATCH` windows.
        learning_rate: Peak learning rate.
        seed: Seed of the initial weights and of the order of the text.
        progress: Progress callback.
    """
    model = _random_model(seed) if start is None else AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    text = np.array(windows(documents, tokenizer, _LENGTH, max_tokens=steps * _BATCH * _LENGTH, seed=seed), np.int64)
    model.train()
    checkpoint = Checkpoint(
        output.with_name(f".{output.name}.training"),
        stage_key(model=fingerprint(model), text=text.tolist(), steps=steps, learning_rate=learning_rate, seed=seed),
    )
    train(
        token_loss(model),
        dict(model.named_parameters()),
        text,
        budget=TrainingBudget(steps),
        batch=_BATCH,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        title=f"{output.name}: train",
        progress=progress,
    )
    save_member(model, tokenizer, output)
    checkpoint.remove()


def _random_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
