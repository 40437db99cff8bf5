"""Two tiny experts trained from one base, for tests of students: trained once, in a few seconds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgemix.export.data.text import windows
from edgemix.export.demo.tiny import train_tokenizer
from edgemix.export.models.save import save_member
from edgemix.export.training.loop import TrainingBudget, train
from edgemix.export.training.token_loss import token_loss
from edgemix.recipe.compression import Student
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource

if TYPE_CHECKING:
    from pathlib import Path

ANIMALS, PLACES = ("cat", "dog", "owl", "fox", "hen"), ("mat", "log", "bough", "roof")
TEXTS = {
    "animals": [f"the {a} sat on the {p}, and all was well with the {a} on the {p}.\n" * 6 for a in ANIMALS
                for p in PLACES],
    "numbers": [f"{i} plus {j} is {i + j}, and {j} plus {i} is {i + j}.\n" * 6 for i in range(6) for j in range(4)],
}  # fmt: skip
LENGTH, VOCABULARY, LAYERS = 32, 300, 6


def write_setting(folder: Path) -> Path:
    """Members, texts and the tokenizer, under `folder`."""
    everything = [text for texts in TEXTS.values() for text in texts]
    tokenizer = train_tokenizer(everything)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    _train(base, tokenizer, everything, steps=60)
    state = {name: each.clone() for name, each in base.state_dict().items()}
    for name, texts in TEXTS.items():
        base.load_state_dict(state)
        _train(base, tokenizer, texts, steps=20)
        save_member(base.eval(), tokenizer, folder / name)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::2]))
        (folder / f"{name}-validation.txt").write_text("".join(texts[1::2]))
    return folder


def recipe_in(folder: Path, **student: Any) -> Recipe:
    """Both experts, a student of two layers, and 12 steps; `student` replaces what it says."""
    options = {"prune": None, "steps": 12, "batch": 4, "length": LENGTH, "learning_rate": 3e-3, "top_k": 16}
    return Recipe(
        members=tuple(MemberRecipe(name, name) for name in TEXTS),
        weights={"animals": 0.6, "numbers": 0.4},
        student=Student(**options | student),
        data=Data(
            training={name: TextSource(f"{name}.jsonl") for name in TEXTS},
            validation={name: TextSource(f"{name}-validation.txt") for name in TEXTS},
            window=LENGTH,
        ),
        folder=folder,
    )


def _train(model: LlamaForCausalLM, tokenizer: Any, texts: list[str], steps: int) -> None:
    ids = np.array(windows(texts, tokenizer, LENGTH, seed=0), np.int64)
    model.train()
    train(
        token_loss(model),
        dict(model.named_parameters()),
        ids,
        budget=TrainingBudget(steps),
        batch=16,
        learning_rate=5e-3,
    )
