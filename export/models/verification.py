"""Check that a loaded model is its files: nothing missing, nothing left aside, every value the same and finite.

transformers fills what it does not find with random numbers and leaves out what it does not know, both with a warning
only. Two checks stand between: its own report, and a comparison with the files that does not depend on it.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemix.errors import InputError
from edgemix.export.models.checkpoint import Checkpoint, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

_BUFFERS = {
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$": None,
    r"(^|\.)position_ids$": None,
    r"(^|\.)attn\.causal_mask$": None,
    r"(^|\.)(attn|attention)\.(bias|masked_bias)$": (0, 1, 4),
}
"""Names of what older versions of transformers saved, though it is computed from the configuration: rotary tables,
positions, and masks of attention, with the numbers of dimensions that tell a mask from a bias (a bias of one dimension
has more than one element).
"""

_WRAPPERS = {
    "_orig_mod.": "torch.compile() put it there: save the model inside, model._orig_mod.save_pretrained().",
    "_fsdp_wrapped_module.": "FSDP put it there: save the full state of the model inside.",
    "_checkpoint_wrapped_module.": "activation checkpointing put it there: save the model inside.",
    "base_layer.": "PEFT put it there: merge the adapter first, model.merge_and_unload().save_pretrained().",
    "base_model.model.": "PEFT put it there: merge the adapter first, model.merge_and_unload().save_pretrained().",
    "module.": "data parallelism put it there: save the model inside, model.module.save_pretrained().",
}
"""Parts of tensor names that wrappers of models add, and what to do about them."""

_AGAIN = "Save the model again with save_pretrained(), or correct config.json if it is another model's."


def check_report(name: str, info: Mapping[str, Any], model: PreTrainedModel, files: Checkpoint | None = None) -> None:
    """Judge transformers' own report on a load.

    Args:
        name: The model's, in messages.
        info: From `from_pretrained(output_loading_info=True)`, or of the same form.
        model: As it was loaded.
        files: The files that it was read from; None for other kinds than safetensors.

    Raises:
        InputError: Tensors are missing, left aside or of other shapes; the message names them.
    """
    stored = files.tensors if files else {}
    missing = sorted(key for key in info["missing_keys"] if not is_buffer(key, model.state_dict()[key].shape))
    unused = sorted(
        key for key in info["unexpected_keys"] if not is_buffer(key, stored[key].shape if key in stored else None)
    )
    shapes = sorted(info["mismatched_keys"])
    lines = [f"it lacks {counted(missing)}"] if missing else []
    lines += [f"the model has no place for {counted(unused)}"] if unused else []
    if shapes:
        _, found, expected = shapes[0]
        lines.append(
            f"{counted([each[0] for each in shapes])}: {list(found)} in the file, {list(expected)} in the model"
        )
    lines += [str(message).strip().splitlines()[0] for message in info.get("error_msgs", ())]
    if lines:
        raise _another_model(name, lines, unused)


def check_weights(name: str, files: Checkpoint, model: PreTrainedModel, *, quantized: bool = False) -> list[str]:
    """Compare a model with its files, tensor by tensor. What transformers merges or splits while it reads is compared
    by the sum of squares.

    Args:
        name: The model's, in messages.
        files: The files that it was read from.
        model: As it was loaded, in fp32.
        quantized: Whether linears were quantized as they were read; their values are not compared.

    Returns:
        Names of the tensors that the model's class leaves aside on purpose.

    Raises:
        InputError: A tensor is not in the model, or with other values; a parameter is not in the files; a weight is NaN
            or infinite.
    """
    parameters = model.state_dict(keep_vars=True)
    found, rest, aside = set[int](), dict[str, float](), list[str]()
    elements = 0
    for key, tensor in files.read():
        parameter = _counterpart(key, parameters, model.base_model_prefix)
        if parameter is None and is_buffer(key, tensor.shape):
            continue
        if parameter is None and _listed(key, getattr(model, "_keys_to_ignore_on_load_unexpected", None)):
            aside.append(key)
            continue
        check_stored(name, key, tensor, files.tensors[key].dtype, is_float=files.tensors[key].is_float)
        if parameter is None or (parameter.shape != tensor.shape and not quantized):
            rest[key], elements = _squares(tensor), elements + tensor.numel()
            continue
        found.add(id(parameter))
        if parameter.is_floating_point() and not torch.equal(tensor.to(parameter.dtype), parameter.detach()):
            raise _another_model(name, [f"{key} has other values in the model than in {files.tensors[key].file.name}"])
    if quantized:
        return aside
    absent = {
        key: parameter
        for key, parameter in parameters.items()
        if isinstance(parameter, nn.Parameter) and id(parameter) not in found
    }
    _check_rest(name, rest, elements, {id(each): (key, each) for key, each in absent.items()})
    return aside


def _check_rest(name: str, rest: dict[str, float], elements: int, absent: Mapping[int, tuple[str, Tensor]]) -> None:
    """Compare what has no counterpart of the same name: as many elements on both sides, of the same sum of squares."""
    squares = math.fsum(_squares(each) for _, each in absent.values())
    if elements == sum(each.numel() for _, each in absent.values()) and math.isclose(
        squares, math.fsum(rest.values()), rel_tol=1e-6
    ):
        return
    lines = [f"its files lack {counted(sorted(key for key, _ in absent.values()))}"] if absent else []
    lines += [f"the model does not hold {counted(sorted(rest))}"] if rest else []
    raise _another_model(name, lines, list(rest))


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse a model with weights that are NaN or infinite; the message names the first.

    Raises:
        InputError: There are some.
    """
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not _finite(parameter.detach()):
            raise _not_finite(name, key, parameter.detach())


def is_buffer(key: str, shape: tuple[int, ...] | None) -> bool:
    """Return whether a tensor of a file is one that models compute for themselves.

    Args:
        key: Its name.
        shape: Its shape; None if it is not known.
    """
    for pattern, dimensions in _BUFFERS.items():
        if re.search(pattern, key):
            return dimensions is None or (
                shape is not None and len(shape) in dimensions and (len(shape) != 1 or shape == (1,))
            )
    return False


def _counterpart(key: str, parameters: Mapping[str, Tensor], prefix: str) -> Tensor | None:
    """Return the parameter or buffer of a stored name; models without a head are saved without a prefix."""
    for candidate in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        if candidate in parameters:
            return parameters[candidate]
    return None


def _listed(key: str, patterns: Any) -> bool:
    return any(re.search(pattern, key) for pattern in patterns or ())


def check_stored(name: str, key: str, tensor: Tensor, dtype: str, *, is_float: bool) -> None:
    """Refuse a tensor of a file that is quantized, NaN or infinite.

    Args:
        name: The model's, in messages.
        key: The tensor's name.
        tensor: The tensor.
        dtype: Its safetensors dtype.
        is_float: Whether that is one of plain numbers.

    Raises:
        InputError: It is.
    """
    if not is_float:
        raise InputError(
            f"{name}: the weights {key} are stored as {dtype}: they are quantized",
            "Give the unquantized model, or a GGUF file.",
        )
    if tensor.numel() and not _finite(tensor):
        raise _not_finite(name, key, tensor)


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # NaN wherever one is in the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _not_finite(name: str, key: str, tensor: Tensor) -> InputError:
    nan, count = int(tensor.isnan().sum()), int((~tensor.isfinite()).sum())
    kind = "NaN" if nan == count else "infinite" if nan == 0 else "NaN or infinite"
    return InputError(
        f"{name}: {count:,} of {tensor.numel():,} weights of {key} are {kind}",
        "The model was damaged in training or saving: use an earlier checkpoint.",
    )


def _squares(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def _another_model(name: str, lines: list[str], unused: list[str] | None = None) -> InputError:
    remedy = (
        next(
            (
                f"About {part!r} in the names: {text}"
                for part, text in _WRAPPERS.items()
                if any(_has(part, k) for k in unused)
            ),
            _AGAIN,
        )
        if unused
        else _AGAIN
    )
    return InputError("\n  ".join([f"{name}: its files are not the model of its config.json:", *lines]), remedy)


def _has(part: str, key: str) -> bool:
    return f".{part}" in f".{key}"
