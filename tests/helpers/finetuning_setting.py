"""Text and options of short fine-tunes."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = [f"the {animal} sat on the {place}, and all was well with the {animal}.\n" * 12
        for animal in ("cat", "dog", "owl", "fox") for place in ("mat", "log", "bough")]  # fmt: skip


OPTIONS = {"base_name": "tiny", "rank": 4, "steps": 12, "batch": 4, "length": 24, "learning_rate": 1e-2}


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def eos_tokenizer():
    """A tokenizer of bytes, without merges, of 160 ids."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
                                 if i < 159} | {"<eos>": 159}, []))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
