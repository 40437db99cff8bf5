"""Build the same decoder with fewer channels, heads and layers: select rows and columns, and adapt the configuration.

Supported sizes are read from the model that its class builds from the configuration: others are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError
from edgemix.export.models.layout import Part, layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel


_FFN_KEYS = ("ffn_dim", "n_inner", "intermediate_size")
_REMEDY = "Leave heads out, and cut channels or layers."


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder: its number of layers, and in each layer the feed-forward channels and the key-value heads."""

    layers: int
    ffn: int
    key_value_heads: int


class Structure:
    """The layers and sizes of a decoder.

    Attributes:
        layers: Decoder layers in the order of execution.
        sizes: The decoder's sizes.
        group: Number of columns of the attention's output projection that belong to a key-value head: those of all
            query heads that share it.

    Raises:
        InputError: The model's structure is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = layout(model).layers
        first = self.layers[0]
        self.sizes = Sizes(len(self.layers), first.down.weight.shape[1], first.key_value_heads)
        self._queries = first.heads // first.key_value_heads
        self._head_dim = first.head_dim
        self.group = self._queries * first.head_dim
        self._names = {module: name for name, module in model.named_modules()}

    def resized(
        self, layers: Sequence[int], channels: Sequence[Tensor], heads: Sequence[Tensor], weights: Mapping[Part, Tensor]
    ) -> PreTrainedModel:
        """Return a new model of the same class with a subset of layers, channels and key-value heads.

        Args:
            layers: Indices of the layers to keep, ascending.
            channels: For each of them, the channels to keep: int64, ascending, equally many in every layer.
            heads: For each of them, the key-value heads to keep, each with its query heads.
            weights: New weights [outputs, inputs] of parts that read channels or heads, with all original columns.

        Raises:
            InputError: The model's class does not support these sizes.
        """
        sizes = Sizes(len(layers), len(channels[0]), len(heads[0]))
        config = self._config(sizes, layers)
        state = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        for index, some_channels, some_heads in zip(layers, channels, heads, strict=True):
            layer = self.layers[index]
            for part in (layer.down, layer.output):
                if part in weights:
                    new = weights[part]
                    state[f"{self._names[part.module]}.weight"] = new.T if isinstance(part.module, Conv1D) else new
            if sizes.ffn < self.sizes.ffn:
                self._select_rows(state, dict.fromkeys(layer.mlp_readers, some_channels))
                self._select_columns(state, layer.down, some_channels)
            if sizes.key_value_heads < self.sizes.key_value_heads:
                key_value, group = (rows_of(some_heads, size) for size in (self._head_dim, self.group))
                self._select_rows(state, {layer.query: group, layer.key: key_value, layer.value: key_value})
                self._select_columns(state, layer.output, group)
        return _new_model(self.model, config, self._renamed(state, layers))

    def allows(self, sizes: Sizes) -> bool:
        """Return whether the model's configuration accepts these sizes."""
        try:
            self._config(sizes, range(sizes.layers))
        except InputError:
            return False
        return True

    def _select_rows(self, state: dict[str, Tensor], parts: Mapping[Part, Tensor]) -> None:
        """Keep some rows of parts, several of which may share a module."""
        rows: dict[nn.Module, list[Tensor]] = {}
        for part, kept in parts.items():
            every = torch.arange(len(Part(part.module).weight))
            rows.setdefault(part.module, []).append((every if part.rows is None else every[part.rows])[kept])
        for module, found in rows.items():
            name, kept = self._names[module], torch.cat(found).sort().values
            axis = 1 if isinstance(module, Conv1D) else 0
            state[f"{name}.weight"] = state[f"{name}.weight"].index_select(axis, kept)
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][kept]

    def _select_columns(self, state: dict[str, Tensor], part: Part, columns: Tensor) -> None:
        name, axis = self._names[part.module], 0 if isinstance(part.module, Conv1D) else 1
        state[f"{name}.weight"] = state[f"{name}.weight"].index_select(axis, columns)

    def _renamed(self, state: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
        """Return the state with only the kept layers, renumbered."""
        prefix = self.layers[0].name.rpartition(".")[0] + "."
        numbers = {index: number for number, index in enumerate(layers)}
        renamed = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                index, dot, rest = name.removeprefix(prefix).partition(".")
                if int(index) in numbers:
                    renamed[f"{prefix}{numbers[int(index)]}{dot}{rest}"] = tensor
            else:
                renamed[name] = tensor
        return renamed

    def _config(self, sizes: Sizes, layers: Sequence[int]) -> Any:
        old = self.model.config
        plain = old.to_dict()
        changes: dict[str, Any] = {}
        if sizes.ffn != self.sizes.ffn:
            key = next((key for key in _FFN_KEYS if hasattr(old, key)), None)
            if key is None:
                raise InputError(
                    f"channels of the model type {old.model_type!r} cannot be cut: their number follows from others",
                    "Leave ffn out, and cut layers.",
                )
            changes[key] = sizes.ffn
        if sizes.key_value_heads != self.sizes.key_value_heads:
            changes["num_attention_heads"] = sizes.key_value_heads * self._queries
            changes["num_key_value_heads"] = sizes.key_value_heads
            changes["head_dim"] = self._head_dim
        if sizes.layers != self.sizes.layers:
            changes["num_hidden_layers"] = sizes.layers
            changes |= {
                key: [value[index] for index in layers]
                for key, value in plain.items()
                if isinstance(value, list | tuple) and len(value) == self.sizes.layers and "layer" in key
            }
        names = getattr(old, "attribute_map", {})
        try:
            new = type(old).from_dict(plain | {names.get(key, key): value for key, value in changes.items()})
        except Exception as error:  # noqa: BLE001 - configurations raise anything
            raise InputError(
                f"the model type {old.model_type!r} does not take {sizes}: {_last_line(error)}", _REMEDY
            ) from None
        new._attn_implementation = old._attn_implementation
        return new


def rows_of(units: Tensor, size: int) -> Tensor:
    """Return the indices of all elements of units of `size` elements: int64 [units * size]."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def _new_model(model: PreTrainedModel, config: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    """Return a model of the same class with a given configuration and state.

    Raises:
        InputError: The class builds other shapes from the configuration.
    """
    with torch.random.fork_rng([]):
        new: PreTrainedModel = type(model)(config).to(model.dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in new.state_dict().items()}
    differing = [name for name, shape in expected.items() if name not in state or tuple(state[name].shape) != shape]
    if differing:
        raise InputError(
            f"models of the type {config.model_type!r} cannot have these sizes: {differing[0]} would have the shape "
            f"{expected[differing[0]]}, as others follow from it",
            _REMEDY,
        )
    new.load_state_dict({name: state[name] for name in expected})
    new.generation_config = model.generation_config
    return new.to(model.device).eval().requires_grad_(False)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
