"""Rotations that merge into weights (QuaRot, Ashkboos et al., arXiv 2404.00456; SpinQuant, Liu et al., 2405.16406).

R1 turns the residual stream: what writes it (embeddings, output, down) is multiplied by R on its output side, what
reads it on its input side, and no channel stands out any more. An RMSNorm without gains commutes with every rotation; a
LayerNorm without gains with those that leave the direction of all ones alone, as its mean lies along that. R2 turns
each key-value head's values, undone by the columns of `output`: attention only takes averages of them.

Matrices are multiplied in double precision, so the function changes by no more than fp32's rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemix.errors import InputError
from edgemix.export.models.layout import Layout, layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from edgemix.export.models.layout import Norm, Part

_LEAST_GAIN = 1e-3
"""Smallest gain as a share of a norm's largest: dividing its bias by smaller ones would lose digits."""


def can_rotate(parts: Layout) -> str | None:
    """Return why the residual stream cannot be rotated; None if it can. Values always can."""
    if any(layer.later_norms for layer in parts.layers):
        return "its layers normalize what they add to the residual stream, with gains"
    pairs = list(_norms_and_readers(parts))
    if len({norm.centered for norm, _ in pairs}) > 1:
        return "some of its norms subtract the mean and others do not"
    for norm, readers in pairs:
        gain = norm.gain.abs()
        needed = norm.bias is not None and any(part.bias is None for part in readers)
        if needed and float(gain.min()) < _LEAST_GAIN * float(gain.max()):
            return "a norm has a bias beside gains of almost zero, and what reads it has no bias"
    return None


def fold_norms(model: PreTrainedModel, parts: Layout) -> Layout:
    """Move the gains of all norms into the weights that read them, in place; gains are 1 then.

    A bias goes into the readers' own; where they have none it stays, divided by the gain.

    Returns:
        The layout from here on: head and embedding are no longer tied.

    Raises:
        InputError: It cannot be done (see `can_rotate`).
    """
    if reason := can_rotate(parts):
        raise InputError(f"{type(model).__name__} cannot be rotated: {reason}", "Set quantization.rotate to false.")
    if parts.tied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        parts = layout(model)
    for norm, readers in _norms_and_readers(parts):
        gain = norm.gain.double()
        if norm.bias is not None:
            biases = [part.bias for part in readers if part.bias is not None]
            if len(biases) == len(readers):
                for part, bias in zip(readers, biases, strict=True):
                    part.set_bias(bias.double() + part.weight.double() @ norm.bias.double())
                norm.bias.zero_()
            else:
                norm.bias.copy_(norm.bias.double() / gain)
        for part in readers:
            part.set_weight(part.weight.double() * gain)
        norm.set_gain(torch.ones_like(gain))
    return parts


def rotate_residual(model: PreTrainedModel, parts: Layout, seed: int = 0) -> Layout:
    """Rotate the residual stream at random (R1), in place; norms are folded first.

    Returns:
        The layout from here on: head and embedding are no longer tied.

    Raises:
        InputError: It cannot be done (see `can_rotate`).
    """
    parts = fold_norms(model, parts)
    size, generator = parts.embedding.embedding_dim, torch.Generator().manual_seed(seed)
    centered = parts.final_norm.centered
    turn = (_rotation_around_ones if centered else _rotation)(size, generator).to(parts.embedding.weight.device)
    for table in (parts.embedding, *parts.positions):
        weight = table.weight.detach()
        weight.copy_(weight.double() @ turn)
    for norm, readers in _norms_and_readers(parts):
        if norm.bias is not None:
            norm.bias.copy_(norm.bias.double() @ turn)
        for part in readers:
            part.set_weight(part.weight.double() @ turn)
    for layer in parts.layers:
        for part in (layer.output, layer.down):
            _turn_outputs(part, turn)
    return parts


def rotate_values(parts: Layout, seed: int = 0) -> None:
    """Rotate each key-value head's values at random, and the inputs of `output` back (R2), in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in parts.layers:
        value, output = layer.value, layer.output
        turns = torch.stack([_rotation(layer.head_dim, generator) for _ in range(layer.key_value_heads)])
        turns = turns.to(value.weight.device)
        heads = (layer.key_value_heads, layer.head_dim)
        turned = turns.mT @ value.weight.double().unflatten(0, heads)
        value.set_weight(turned.flatten(0, 1))
        if value.bias is not None:
            value.set_bias((value.bias.double().view(*heads)[:, None] @ turns).flatten())
        # [hidden, key-value heads, query heads of each, head_dim]
        columns = output.weight.double().unflatten(1, (layer.key_value_heads, -1, layer.head_dim))
        output.set_weight((columns @ turns).flatten(1))


def _norms_and_readers(parts: Layout) -> Iterator[tuple[Norm, tuple[Part, ...]]]:
    for layer in parts.layers:
        yield layer.attention_norm, layer.attention_readers
        yield layer.mlp_norm, layer.mlp_readers
    yield parts.final_norm, (parts.head,)


def _turn_outputs(part: Part, turn: Tensor) -> None:
    part.set_weight(turn.T @ part.weight.double())
    if part.bias is not None:
        part.set_bias(part.bias.double() @ turn)


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64 [size, size], that spreads every channel over all: a Hadamard matrix
    of the largest power of two in `size`, times (Kronecker) a Hartley transform of the odd rest, with random signs.

    No entry is larger than sqrt(2 / size), unlike those of a matrix drawn from all rotations.
    """
    even = size & -size
    odd = size // even
    turns = torch.arange(odd, dtype=torch.float64).outer(torch.arange(odd, dtype=torch.float64)) * (2 * math.pi / odd)
    matrix = (turns.cos() + turns.sin()) / math.sqrt(odd)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(even.bit_length() - 1):
        matrix = torch.kron(pair, matrix)
    signs = torch.randint(0, 2, (2, size), generator=generator, dtype=torch.float64) * 2 - 1
    return signs[0, :, None] * matrix * signs[1]


def _rotation_around_ones(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64 [size, size], that maps the vector of ones to itself."""
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1
    basis = torch.linalg.qr(drawn).Q  # its first vector is along the ones
    rest = basis[:, 1:]
    again = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)).Q
    return torch.full((size, size), 1 / size, dtype=torch.float64) + rest @ again @ rest.T
