"""Attach LoRA adapters (Hu et al., arXiv 2106.09685) to a model, train them, and write them as PEFT folders."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peft
import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError
from edgemix.export.models.adapters import add_adapter
from edgemix.export.models.location import Location

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

_MAX_EAGER_LENGTH = 512
"""Longest windows, in tokens, for which attention scores [length, length] are materialized."""


@dataclass(frozen=True)
class FreshAdapter:
    """A new adapter on all linear projections, whose updates are initially zero.

    Attributes:
        rank: Rank of each update.
        alpha: Updates are scaled by alpha / rank.
        seed: Seed of the randomly initialized factor.
    """

    rank: int
    alpha: float
    seed: int


class Adapters:
    """Several adapters of one model, which share its frozen weights; one is active at a time.

    Attributes:
        device: The model's device.
    """

    def __init__(self, model: peft.PeftModel, names: Sequence[str]) -> None:
        self._model, self._names = model, names
        self._parameters = [dict(self._find(name)) for name in names]
        self._active: int | None = None
        self.device = model.device
        self.activate(0)

    def activate(self, index: int) -> None:
        """Make an adapter the active one; all of them stay trainable."""
        if index == self._active:
            return
        self._active = index
        self._model.set_adapter(self._names[index])
        for parameters in self._parameters:
            for parameter in parameters.values():  # set_adapter freezes the inactive ones
                parameter.requires_grad_()

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        """Return an adapter's weights by name; no two adapters share a name."""
        return self._parameters[index]

    def write(self, index: int, base_name: str, folder: Path) -> None:
        """Write an adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

        Args:
            index: Index of the adapter.
            base_name: Base model name to record; never a local path.
            folder: An empty folder.
        """
        name = self._names[index]
        config = copy.deepcopy(self._model.peft_config[name])
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)
        # Without save_embedding_layers=False, peft looks the base model up on the hub.
        weights = peft.get_peft_model_state_dict(self._model, adapter_name=name, save_embedding_layers=False)
        weights = {key: each.detach().cpu().contiguous() for key, each in weights.items()}
        config.save_pretrained(str(folder))
        (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of torch's activation checkpointing: layers are recomputed with the active adapter."""
        return nullcontext(), self._reactivate(self._active or 0)

    @contextmanager
    def _reactivate(self, index: int) -> Iterator[None]:
        self.activate(index)
        yield

    def _find(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters of an adapter.

        Raises:
            InputError: It trains more than LoRA matrices: whole layers, biases, token embeddings.
        """
        self._model.set_adapter(name)
        for key, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                if ".lora_" not in key:
                    raise InputError(
                        f"an adapter that also changes {key} cannot be trained further",
                        "Merge it into its base model first, and name that as the member's model.",
                    )
                yield key, parameter


@contextmanager
def attach_adapters(
    model: PreTrainedModel, adapters: Sequence[FreshAdapter | Location], *, recompute: bool = False
) -> Iterator[Adapters]:
    """Attach adapters to a model, on the GPU if there is one, and remove them when the block ends.

    Args:
        model: A causal language model; restored and frozen at the end.
        adapters: New adapters, or PEFT folders to continue training from.
        recompute: Checkpoint activations between layers and recompute each layer for its gradients: a third more
            computation, a fraction of the memory (Chen et al., arXiv 1604.06174).

    Raises:
        InputError: The model has no linear layer, an adapter does not fit it, or a rank exceeds every layer's.
    """
    device = model.device
    names = [f"member{index}" for index in range(len(adapters))]
    fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    wrapped = model.requires_grad_(requires_grad=False)
    try:
        for name, adapter in zip(names, adapters, strict=True):
            if isinstance(adapter, Location):
                wrapped = add_adapter(wrapped, adapter, name, trainable=True)
            else:
                wrapped = _add_fresh(wrapped, name, adapter, fan_in_fan_out=fan_in_fan_out)
        attached = Adapters(wrapped.to("cuda" if torch.cuda.is_available() else device), names)
        if recompute and model.supports_gradient_checkpointing:
            # transformers 5.23 renamed the method, and warns about the old name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": attached.contexts})
        yield attached
    finally:
        if recompute and model.supports_gradient_checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        if isinstance(wrapped, peft.PeftModel):
            wrapped.unload()
        model.to(device).requires_grad_(requires_grad=False).eval()


def _add_fresh(
    model: PreTrainedModel | peft.PeftModel, name: str, adapter: FreshAdapter, *, fan_in_fan_out: bool
) -> peft.PeftModel:
    if 0 < (highest := _max_rank(model)) < adapter.rank:
        raise InputError(f"the rank {adapter.rank} is more than that of any layer of this model, {highest}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules="all-linear",
        fan_in_fan_out=fan_in_fan_out,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(adapter.seed)
        try:
            if not isinstance(model, peft.PeftModel):
                return peft.get_peft_model(model, config, name)
            model.add_adapter(name, config)
        except ValueError as error:
            raise InputError(f"this model has no linear layer for an adapter: {error}") from error
    return model


def _max_rank(model: PreTrainedModel | peft.PeftModel) -> int:
    """Return the highest possible rank of a linear layer's update, 0 without linear layers. A higher one adds nothing,
    and may take all memory there is.
    """
    shapes = [
        module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    return max((min(shape) for shape in shapes), default=0)


@contextmanager
def eager_attention(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Use eager attention for short windows on CPUs, where torch's fused attention has a slow backward pass: a step
    takes a seventh less time.
    """
    before = model.config._attn_implementation
    if model.device.type != "cpu" or length > _MAX_EAGER_LENGTH:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def frozen_in_bfloat16(model: PreTrainedModel, *, enabled: bool) -> Iterator[None]:
    """Keep the frozen fp32 weights of linear layers in bfloat16, but for embeddings and the head, and restore them.

    For losses that run in bfloat16: torch.autocast converts frozen weights anew, to the same numbers, in every forward
    pass, which takes a tenth of a training step's time on a CPU.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and not any(module.weight is end.weight for end in ends if end is not None)
    ]
    originals = [weight.data for weight in weights] if enabled else []
    try:
        for weight, original in zip(weights, originals, strict=False):
            weight.data = original.to(torch.bfloat16)
        yield
    finally:
        for weight, original in zip(weights, originals, strict=False):
            weight.data = original
