"""Read LoRA adapters, and merge them into models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.errors import InputError
from edgemix.export.models.location import Location, reading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PreTrainedModel, adapter: Location) -> PreTrainedModel:
    """Merge a LoRA adapter into `model`, in place.

    Raises:
        InputError: See `add_adapter`.
    """
    merged = add_adapter(model, adapter).merge_and_unload()
    return merged.eval().requires_grad_(False)


def add_adapter(
    model: PreTrainedModel | PeftModel, adapter: Location, name: str = "default", *, trainable: bool = False
) -> PeftModel:
    """Add a LoRA adapter's layers to a model, which may have others already.

    Raises:
        InputError: It is not a LoRA adapter in safetensors, or it does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    adapter.weight_files()
    with reading(adapter):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise InputError(f"{adapter.name}: a {kind} adapter; edgemix merges LoRA adapters")
        if config.megatron_config:  # it would import a module of the adapter's choice
            raise InputError(f"{adapter.name}: an adapter for Megatron; edgemix merges plain LoRA adapters")
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter.folder), name, is_trainable=trainable)
            return model
        return PeftModel.from_pretrained(model, str(adapter.folder), name, is_trainable=trainable)
