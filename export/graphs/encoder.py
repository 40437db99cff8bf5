"""Graphs of encoders with their heads, traced from the torch model: token ids in, logits out.

Every graph has the tensors of an "encoder" in `edgemix.bundle.graph_io`, any batch and any length, and masks what the
attention mask leaves out on either side. Heads that read the last token find it by the mask, and not by the padding's
id, which a text may hold and many tokenizers lack.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn
from torch.export import Dim

from edgemix.bundle import graph_io
from edgemix.errors import EdgemixError, InputError
from edgemix.export.graphs.traced import OPSET, quiet_tracer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

_BATCH, _LENGTH = 2, 19
"""Sizes to trace with; the tracer takes equal sizes for one axis, and ones for constants."""


class _Logits(nn.Module):  # type: ignore[misc]
    """A model that returns its logits alone, from tensors by position."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._names = model, tuple(names)
        self._negative = "input_mask" in signature(model.base_model.forward).parameters

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self._names, tensors, strict=True))
        if (
            self._negative
        ):  # XLNet's own mask says what is hidden; it makes it of the other with numbers of another type
            inputs["input_mask"] = (1 - inputs.pop(graph_io.ATTENTION_MASK)).float()
        logits: torch.Tensor = self.model(**inputs, return_dict=True).logits
        return logits


class _LastToken(nn.Module):  # type: ignore[misc]
    """A decoder with a classification head, which reads the last token that the mask does not hide."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self._base, self._head, self._names = model.base_model, model.score, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self._names, tensors, strict=True))
        mask = inputs[graph_io.ATTENTION_MASK]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._base(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask).amax(dim=-1)
        return self._head(hidden[torch.arange(hidden.shape[0], device=mask.device), last])


def encoder_inputs(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the inputs that a model's graph has, of `graph_io`, in order."""
    typed = (getattr(model.config, "type_vocab_size", 0) or 0) > 0 or model.config.model_type == "xlnet"
    accepts = signature(model.base_model.forward).parameters
    names = [graph_io.INPUT_IDS, graph_io.ATTENTION_MASK]
    return (*names, graph_io.TOKEN_TYPE_IDS) if typed and graph_io.TOKEN_TYPE_IDS in accepts else tuple(names)


def build_encoder(model: PreTrainedModel) -> ir.Model:
    """Trace the fp32 graph of a model with its head.

    Args:
        model: In evaluation mode, on the CPU.

    Raises:
        InputError: Models of its type cannot be traced.
    """
    names = encoder_inputs(model)
    reads_last = hasattr(model, "score") and isinstance(getattr(model, "score", None), nn.Linear)
    by_sequence = "ForSequenceClassification" in type(model).__name__
    module: nn.Module = (_LastToken if reads_last and by_sequence else _Logits)(model, names)
    sample = [_sample(name, model) for name in names]
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with quiet_tracer(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(sample),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=[graph_io.LOGITS],
                dynamic_shapes={"tensors": tuple(axes for _ in names)},
                optimize=True,
            )
    except Exception as error:
        raise InputError(
            f"models of the type {model.config.model_type!r} with this head cannot be exported: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]
        ) from error
    if program is None:
        raise EdgemixError("the tracer returned nothing")
    graph: ir.Model = program.model
    _name_axes(graph.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.RemoveUnusedNodesPass()(graph)
    return graph


def save_encoder(graph: ir.Model, path: Path) -> None:
    """Write a graph with its weights beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common.ClearMetadataAndDocStringPass()(graph)
    ir.save(graph, path, external_data=f"{path.name}.data")


def _sample(name: str, model: Any) -> torch.Tensor:
    shape = (_BATCH, _LENGTH)
    if name == graph_io.INPUT_IDS:
        least = (getattr(model.config, "pad_token_id", None) or 0) + 1
        return torch.arange(_BATCH * _LENGTH).reshape(shape) % max(2, min(32, model.config.vocab_size - least)) + least
    if name == graph_io.TOKEN_TYPE_IDS:
        return torch.zeros(shape, dtype=torch.long)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, -4:] = 0  # no branch of a model without padding
    return mask


def _name_axes(graph: ir.Graph) -> None:
    for value in graph.inputs:
        value.shape = ir.Shape(["batch", "sequence"])
    for value in graph.outputs:
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape(["batch", "sequence", value.shape[-1]])
        elif value.shape is not None:
            value.shape = ir.Shape(["batch", value.shape[-1]])
