"""The structure of a Hugging Face decoder: which linears read and write the residual stream, between which norms.

Rotation, folding, quantization and pruning work on this view of a model, whatever names and packed linears its family
has. The structure is read from the modules; a model with an unknown part is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

Linear: TypeAlias = nn.Linear | Conv1D
"""Conv1D is GPT-2's linear, with its weight stored [in, out]."""

_ATTENTION = ("self_attn", "attention", "attn")
_ATTENTION_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm")
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm")
_PACKED = ("qkv_proj", "c_attn")
_INTERLEAVED = ("query_key_value",)
"""Query, key and value of each head side by side, instead of all queries first."""
_OUTPUT = ("o_proj", "c_proj", "dense", "out_proj")
_UP = ("up_proj", "c_fc", "dense_h_to_4h", "fc1")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""Norms of single heads' queries and keys, which folding, rotation and pruning leave alone."""


@dataclass(frozen=True, eq=False)
class Part:
    """One linear map: a module, or some rows (outputs) of a module that packs several.

    Attributes:
        module: The module.
        rows: Its outputs: None for all, a range, or their int64 indices.
    """

    module: Linear
    rows: slice | Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """[out, in], without gradient; a view unless `rows` are indices. Change it by `set_weight`."""
        whole = self.module.weight.detach()
        whole = whole.T if isinstance(self.module, Conv1D) else whole
        return whole if self.rows is None else whole[self.rows]

    def set_weight(self, weight: Tensor) -> None:
        """Overwrite the weight with one of the same shape [out, in], of any dtype."""
        whole = self.module.weight.detach()
        whole = whole.T if isinstance(self.module, Conv1D) else whole
        whole[slice(None) if self.rows is None else self.rows] = weight.to(whole)

    @property
    def bias(self) -> Tensor | None:
        """[out], without gradient."""
        if self.module.bias is None:
            return None
        whole = self.module.bias.detach()
        return whole if self.rows is None else whole[self.rows]

    def set_bias(self, bias: Tensor) -> None:
        """Overwrite the bias, which must be there."""
        whole = self.module.bias.detach()
        whole[slice(None) if self.rows is None else self.rows] = bias.to(whole)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization with a gain for each channel.

    Attributes:
        module: With `weight` [channels], and `bias` where there is one.
        offset: Added to `weight` by its forward (1 in gemma).
        centered: Whether it subtracts the mean (LayerNorm) or not (RMSNorm).
    """

    module: nn.Module
    offset: float
    centered: bool

    @property
    def gain(self) -> Tensor:
        """Factors of the normalized values, [channels]."""
        return self.module.weight.detach() + self.offset

    def set_gain(self, gain: Tensor) -> None:
        """Overwrite the gain with one of the same shape, of any dtype."""
        self.module.weight.detach().copy_(gain - self.offset)

    @property
    def bias(self) -> Tensor | None:
        """[channels], without gradient; a view."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer: attention, then a feed-forward network, each after a norm (or both at once on the same input).

    Attributes:
        name: The module's name within the model.
        module: The layer.
        attention_norm: The norm before query, key and value.
        mlp_norm: The norm before gate and up.
        later_norms: Norms of the outputs of attention and feed-forward network (gemma 2 and 3).
        query, key, value: [heads * head_dim, hidden], the latter two [key_value_heads * head_dim, hidden].
        output: [hidden, heads * head_dim].
        gate: [channels, hidden], activated and multiplied with `up`'s outputs; None if `up` is activated itself.
        up, down: [channels, hidden] and [hidden, channels].
        heads, key_value_heads, head_dim: Query head h reads key-value head h // (heads / key_value_heads).
    """

    name: str
    module: nn.Module
    attention_norm: Norm
    mlp_norm: Norm
    later_norms: tuple[Norm, ...]
    query: Part
    key: Part
    value: Part
    output: Part
    gate: Part | None
    up: Part
    down: Part
    heads: int
    key_value_heads: int
    head_dim: int

    @property
    def attention_readers(self) -> tuple[Part, ...]:
        """The linears that read the attention norm."""
        return self.query, self.key, self.value

    @property
    def mlp_readers(self) -> tuple[Part, ...]:
        """The linears that read the feed-forward norm."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def linears(self) -> dict[str, Part]:
        """Return whole linear modules by name within the model, packed ones once, in the order of computation."""
        parts = (*self.attention_readers, self.output, *self.mlp_readers, self.down)
        modules = dict.fromkeys(part.module for part in parts)
        names = {module: name for name, module in self.module.named_modules()}
        return {f"{self.name}.{names[module]}": Part(module) for module in modules}

    def groups(self) -> list[tuple[str, ...]]:
        """Group the names of `linears` by the activation that they read; exporters may pack the weights of a group."""
        names = {part.module: name for name, part in self.linears().items()}
        readers = (self.attention_readers, (self.output,), self.mlp_readers, (self.down,))
        return [tuple(dict.fromkeys(names[part.module] for part in parts)) for parts in readers]


@dataclass(frozen=True, eq=False)
class Layout:
    """A decoder.

    Attributes:
        embedding: Token embeddings.
        positions: Learned position embeddings, added to the token embeddings.
        layers: The layers, in order.
        final_norm: The norm before the head.
        head: [vocabulary, hidden].
        tied: Whether head and embedding are one tensor.
    """

    embedding: nn.Embedding
    positions: tuple[nn.Embedding, ...]
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Part
    tied: bool

    def linears(self) -> dict[str, Part]:
        """Return the whole linear modules of all layers by name within the model, without the head."""
        return {name: part for layer in self.layers for name, part in layer.linears().items()}


def layout(model: PreTrainedModel) -> Layout:
    """Find the parts of a decoder.

    Raises:
        InputError: The model has an unknown structure; the message names the part.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, Linear):
        raise _unknown(model, "its embedding or its head")
    config = model.config.get_text_config()
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not stacks:
        raise _unknown(model, "its list of layers")
    name, stack = stacks[0]
    trunk = model.get_submodule(name.rpartition(".")[0])
    final_norm = _norm(model, _child(model, trunk, _FINAL_NORM))
    positions = tuple(child for child in trunk.children() if isinstance(child, nn.Embedding) and child is not embedding)
    _refuse_others(model, trunk, [embedding, stack, final_norm.module, *positions])
    layers = tuple(_layer(model, f"{name}.{index}", layer, config) for index, layer in enumerate(stack))
    return Layout(embedding, positions, layers, final_norm, Part(head), head.weight is embedding.weight)


def _layer(model: PreTrainedModel, name: str, layer: nn.Module, config: object) -> DecoderLayer:
    attention = _child(model, layer, _ATTENTION)
    if getattr(layer, "do_layer_norm_before", True) is False:
        raise _unknown(model, "norms after the layers (post-norm)")
    mlp = getattr(layer, "mlp", layer)
    attention_norm, mlp_norm = (_norm(model, _child(model, layer, names)) for names in (_ATTENTION_NORM, _MLP_NORM))
    norms = (attention_norm.module, mlp_norm.module)
    later = tuple(
        _norm(model, child)
        for child in layer.children()
        if child not in norms and not list(child.children()) and [p.ndim for p in child.parameters()] in ([1], [1, 1])
    )
    output = Part(_linear(model, attention, _OUTPUT))
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    head_dim = output.weight.shape[1] // heads
    query, key, value = _attention(model, attention, heads, head_dim)
    gate, up = _gate_and_up(model, mlp)
    down = Part(_linear(model, mlp, _DOWN))
    linears = [part.module for part in (query, key, value, output, up, down, *([gate] if gate else []))]
    if mlp is not layer:
        _refuse_others(model, mlp, linears)
    _refuse_others(model, attention, linears)
    _refuse_others(model, layer, [attention, mlp, *norms, *(norm.module for norm in later), *linears])
    shapes = [len(part.weight) / head_dim for part in (query, key, value)]
    if shapes[0] != heads or shapes[1] != shapes[2] or heads % shapes[1]:
        raise _unknown(model, f"attention of {heads} heads of {head_dim} with {shapes} heads of q, k, v")
    return DecoderLayer(
        name,
        layer,
        attention_norm,
        mlp_norm,
        later,
        query,
        key,
        value,
        output,
        gate,
        up,
        down,
        heads,
        int(shapes[1]),
        head_dim,
    )


def _attention(model: PreTrainedModel, attention: nn.Module, heads: int, head_dim: int) -> Iterator[Part]:
    """Yield query, key and value."""
    if hasattr(attention, "q_proj"):
        yield from (Part(_linear(model, attention, (f"{letter}_proj",))) for letter in "qkv")
        return
    packed = _linear(model, attention, (*_PACKED, *_INTERLEAVED))
    outputs = len(Part(packed).weight)
    if any(hasattr(attention, name) for name in _INTERLEAVED):
        rows = torch.arange(outputs).view(-1, 3, head_dim)
        yield from (Part(packed, rows[:, index].flatten()) for index in range(3))
        return
    queries = heads * head_dim
    both = (outputs - queries) // 2
    yield from (
        Part(packed, slice(start, start + length))
        for start, length in ((0, queries), (queries, both), (queries + both, both))
    )


def _gate_and_up(model: PreTrainedModel, mlp: nn.Module) -> tuple[Part | None, Part]:
    if hasattr(mlp, "gate_up_proj"):
        packed = _linear(model, mlp, ("gate_up_proj",))
        channels = len(Part(packed).weight) // 2
        return Part(packed, slice(0, channels)), Part(packed, slice(channels, 2 * channels))
    gate = Part(_linear(model, mlp, ("gate_proj",))) if hasattr(mlp, "gate_proj") else None
    return gate, Part(_linear(model, mlp, _UP))


def _child(model: PreTrainedModel, parent: nn.Module, names: Iterable[str]) -> nn.Module:
    for name in names:
        if isinstance(child := getattr(parent, name, None), nn.Module):
            return child
    raise _unknown(model, f"a {type(parent).__name__} without any of {', '.join(names)}")


def _linear(model: PreTrainedModel, parent: nn.Module, names: Iterable[str]) -> Linear:
    child = _child(model, parent, names)
    if not isinstance(child, Linear):
        raise _unknown(model, f"a {type(child).__name__} in {type(parent).__name__}, where a linear was expected")
    return child


def _norm(model: PreTrainedModel, module: nn.Module) -> Norm:
    """Return a norm with its formula, found by a probe: names do not show which family adds 1 to its gains."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        raise _unknown(model, f"a norm {type(module).__name__} without gains")
    # Its values differ enough for the mean to show, and are large enough for the epsilon not to.
    probe = torch.linspace(1, 20, len(weight), device=weight.device, dtype=torch.float32)
    with torch.no_grad():
        made = module(probe[None].to(weight.dtype)).float()[0]
    bias = getattr(module, "bias", None)
    made = made if bias is None else made - bias.detach().float()
    for centered in (False, True):
        values = probe - probe.mean() if centered else probe
        values = values / values.square().mean().sqrt()
        for offset in (0.0, 1.0):
            expected = values * (weight.detach().float() + offset)
            if torch.allclose(made, expected, rtol=0.02, atol=0.02):
                return Norm(module, offset, centered)
    raise _unknown(model, f"the norm {type(module).__name__}")


def _refuse_others(model: PreTrainedModel, parent: nn.Module, known: Iterable[nn.Module]) -> None:
    """Raise an error if a module has weights beside the known ones: a gate, an expert, another norm."""
    own = [name for name, _ in parent.named_parameters(recurse=False)]
    kept = set(known)
    own += [
        name
        for name, child in parent.named_children()
        if child not in kept and name not in _HEAD_NORMS and any(True for _ in child.parameters())
    ]
    if own:
        raise _unknown(model, f"{', '.join(own)} in {type(parent).__name__}")


def _unknown(model: PreTrainedModel, what: str) -> InputError:
    return InputError(
        f"{type(model).__name__} has a structure that edgemix does not know: {what}",
        "Leave out pruning, rotation and calibrated quantization for this member.",
    )
