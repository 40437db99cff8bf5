"""Add a LoRA adapter's layers to a model, and check that every tensor of its file is in them.

PEFT leaves aside what fits no module, and fills what it does not find with the beginning of a training: both make the
member its base, without an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors.torch
import torch

from edgemix.errors import InputError
from edgemix.export.models.adapters.config import ADAPTER_CONFIG, read_config
from edgemix.export.models.checkpoint import counted, read_header
from edgemix.export.models.location import reading
from edgemix.export.models.verification import check_stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.models.location import Location

_WEIGHTS = "adapter_model.safetensors"

_COPY = ".modules_to_save."

_PREFIXES = {
    "_orig_mod.": "torch.compile() put it there",
    "_fsdp_wrapped_module.": "FSDP put it there",
    "_checkpoint_wrapped_module.": "activation checkpointing put it there",
    "language_model.": "the adapter was trained on a model of text and images",
    "module.": "data parallelism put it there",
}
"""Parts of tensor names that do not belong to the model, and where they come from."""


def add_adapter(
    model: PreTrainedModel | PeftModel, adapter: Location, name: str = "default", *, trainable: bool = False
) -> PeftModel:
    """Add a LoRA adapter's layers to a model, which may have others already.

    Raises:
        InputError: It is not a LoRA adapter in safetensors, it does not fit the model, or its weights are NaN or
            infinite.
    """
    from peft import PeftModel, set_peft_model_state_dict

    config = read_config(adapter, trainable=trainable)
    tensors = _read_weights(adapter)
    _check_rank(adapter, config, model)
    with reading(adapter):
        if isinstance(model, PeftModel):
            wrapped = model
            wrapped.add_adapter(name, config)
            if trainable:
                wrapped.set_requires_grad(name)
        else:
            wrapped = PeftModel(model, config, name)
        tensors = _without_copies(adapter, tensors)
        _check_fit(adapter, tensors, wrapped, name, trainable=trainable)
        set_peft_model_state_dict(wrapped, tensors, name)
        _check_loaded(adapter, tensors, wrapped, name)
    return wrapped


def _read_weights(adapter: Location) -> dict[str, Tensor]:
    """Read the adapter's tensors by their names in the file."""
    path = adapter.folder / _WEIGHTS
    if not path.is_file():
        adapter.weight_files()  # which refuses a folder with pickled weights only
        found = ", ".join(sorted(each.name for each in adapter.folder.glob("*.safetensors"))[:3])
        raise InputError(
            f"{adapter.name}: {ADAPTER_CONFIG} without {_WEIGHTS}, only {found}",
            "If that is a whole model with the adapter merged, remove adapter_config.json and name it as the model.",
        )
    header = read_header(path, adapter.name)
    if not header:
        raise InputError(f"{adapter.name}: {_WEIGHTS} holds no tensors", "Save or download the adapter again.")
    with reading(adapter):
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    for key, tensor in tensors.items():
        check_stored(adapter.name, key, tensor, header[key].dtype, is_float=header[key].is_float)
    return tensors


def _without_copies(adapter: Location, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the second copies of modules_to_save that PEFT writes if a vocabulary was resized."""
    found = {key: tensor for key, tensor in tensors.items() if _COPY not in key}
    for key, tensor in tensors.items():
        if _COPY in key and not torch.equal(found.setdefault(key.replace(_COPY, "."), tensor), tensor):
            raise InputError(f"{adapter.name}: {_WEIGHTS} holds {key} twice, with different values")
    return found


def _check_rank(adapter: Location, config: LoraConfig, model: PreTrainedModel | PeftModel) -> None:
    """Refuse ranks that no update needs, before memory is allocated for them."""
    most = max((max(each.shape) for each in model.parameters() if each.ndim), default=0)
    for rank in (config.r, *config.rank_pattern.values()):
        if not isinstance(rank, int) or not 1 <= rank <= most:
            raise InputError(
                f"{adapter.name}: {ADAPTER_CONFIG} states a rank of {rank!r}; it must be a number between 1 and {most}"
            )


def _state(wrapped: PeftModel, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter's tensors by the names that PEFT saves them under, and those of the base."""
    from peft import get_peft_model_state_dict

    # Without save_embedding_layers=False, peft looks the base model up on the hub.
    own = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    return own, wrapped.state_dict()


def _check_fit(
    adapter: Location, tensors: Mapping[str, Tensor], wrapped: PeftModel, name: str, *, trainable: bool
) -> None:
    """Compare the names and shapes of a file's tensors with those of the adapter's layers."""
    own, base = _state(wrapped, name)
    known = base | own
    unknown = sorted(tensors.keys() - known.keys())
    missing = sorted(own.keys() - tensors.keys())
    if unknown:
        part = next((part for part in _PREFIXES if any(key.replace(part, "") in own for key in unknown)), None)
        remedy = _other_base(wrapped, name)
        if part:
            remedy = f"Without {part!r} in the names they fit: {_PREFIXES[part]}. Rename them in {_WEIGHTS}."
        raise InputError(f"{adapter.name}: no module of the model has a place for {counted(unknown)}", remedy)
    for key, tensor in tensors.items():
        if tensor.shape != known[key].shape and known[key].is_floating_point():
            raise _other_shape(adapter, key, tensor, known[key], _other_base(wrapped, name))
    if missing:
        raise InputError(
            f"{adapter.name}: {_WEIGHTS} lacks {counted(missing)}, which {ADAPTER_CONFIG} asks for",
            f"Save or download the adapter again. {_other_base(wrapped, name)}",
        )
    changed = [key for key in sorted(tensors.keys() - own.keys()) if not _same(tensors[key], known[key])]
    if changed and trainable:
        raise InputError(
            f"{adapter.name}: an adapter that also holds the base's {counted(changed)} cannot be trained further",
            "Merge it into its base model first, and name that as the member's model.",
        )


def _other_base(wrapped: PeftModel, name: str) -> str:
    stated = wrapped.peft_config[name].base_model_name_or_path
    return f"Give the base model that it was trained on{f', {stated!r:.100}' if stated else ''}."


def _other_shape(adapter: Location, key: str, tensor: Tensor, expected: Tensor, remedy: str) -> InputError:
    sizes = f"{list(tensor.shape)} in the adapter and {list(expected.shape)} in the model"
    rows, wanted = (each.shape[0] if each.ndim else 0 for each in (tensor, expected))
    if tensor.shape[1:] == expected.shape[1:] and any(part in key for part in ("embed", "lm_head", "wte")):
        remedy = (
            f"It was trained after resize_token_embeddings({rows}): resize the base from {wanted} tokens in the same "
            "way, save it with the adapter's tokenizer, and name that as the model."
        )
    return InputError(f"{adapter.name}: {key} is {sizes}", remedy)


def _check_loaded(adapter: Location, tensors: Mapping[str, Tensor], wrapped: PeftModel, name: str) -> None:
    """Compare the values of a file's tensors with those in the model."""
    own, base = _state(wrapped, name)
    known = base | own
    if lost := sorted(key for key, tensor in tensors.items() if not _same(tensor, known[key])):
        raise InputError(
            f"{adapter.name}: the model does not take {counted(lost)} as they are in {_WEIGHTS}",
            "Tensors that the model ties must not differ: save the adapter again, on the model that it was trained on.",
        )


def _same(stored: Tensor, loaded: Tensor) -> bool:
    return not loaded.is_floating_point() or torch.equal(stored.to(loaded.dtype), loaded.detach().cpu())
