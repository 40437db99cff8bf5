"""Merge a LoRA adapter into a model's weights, and compare the result with the model before.

An adapter of the embedding or of the head alone changes one of them, though the model may tie both: they are separated
first (peft 2018, 2777).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemix.errors import InputError, ParityError
from edgemix.export.models.adapters.attaching import add_adapter
from edgemix.export.models.location import reading

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.models.location import Location

_TOLERANCE = 1e-3
"""Largest difference of logits, in units of the largest logit; merging rounds once more, at about 1e-6."""
_TOKENS = 64


def merge_adapter(model: PreTrainedModel, adapter: Location) -> PreTrainedModel:
    """Merge a LoRA adapter into `model`, in place. Where it changes one of two tied weights, they are untied.

    Raises:
        InputError: See `add_adapter`; or it cannot be merged.
        ParityError: The merged model is another one than the model with the adapter beside it.
    """
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    wrapped = add_adapter(model, adapter).eval()
    with reading(adapter):
        ids = _probe(wrapped)
        expected = _logits(wrapped, ids)
        _check_mergeable(adapter, wrapped)
        _untie(wrapped)
        merged: PreTrainedModel = wrapped.merge_and_unload()
        if tied:
            _record_tying(merged)
        difference = float((_logits(merged, ids) - expected).abs().max())
        limit = _TOLERANCE * float(expected.abs().max())
    if not difference <= limit:  # NaN is no match
        raise ParityError(
            f"{adapter.name}: merged, it gives other logits than beside the model: they differ by {difference:.2g} "
            f"(limit {limit:.2g})",
            "Merge it with the library that trained it, and give the whole model.",
        )
    return merged.eval().requires_grad_(False)


def _probe(wrapped: PeftModel) -> Tensor:
    """Return token ids over the whole vocabulary, with those that the adapter has trained: int64 [1, tokens]."""
    trained = wrapped.peft_config[wrapped.active_adapter].trainable_token_indices or []
    if isinstance(trained, dict):
        trained = [index for each in trained.values() for index in each]
    count = wrapped.config.get_text_config().vocab_size
    spread = torch.linspace(0, count - 1, min(_TOKENS, count)).long()
    return torch.cat([spread, torch.tensor(trained[:_TOKENS], dtype=torch.int64)])[None]


def _logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _check_mergeable(adapter: Location, wrapped: PeftModel) -> None:
    from peft.tuners.lora import LoraLayer

    for key, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and any(module.lora_bias.values()):
            base = module.get_base_layer()
            if getattr(base, "bias", None) is None:
                raise InputError(
                    f"{adapter.name}: an adapter with lora_bias cannot be merged: "
                    f"{key.removeprefix('base_model.model.')} has no bias",
                    "Train the adapter without lora_bias.",
                )


def _untie(wrapped: PeftModel) -> None:
    """Give modules that the adapter changes weights of their own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    changed = {
        id(inner)
        for module in wrapped.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for inner in module.modules()
    }
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in wrapped.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    for each in owners.values():
        if len(each) > 1 and any(id(module) in changed for module, _ in each):
            for module, name in each[1:]:
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))


def _record_tying(model: PreTrainedModel) -> None:
    """Tie head and embedding again if both were changed alike, else state in the configuration that they are not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
        return
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
