"""The rotary embedding of a GGUF file: its metadata and its tensors of factors, as transformers states them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.errors import InputError
from edgemix.export.models.gguf_header import DAMAGED, GgufHeader

if TYPE_CHECKING:
    from collections.abc import Mapping

_FREQUENCIES, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({_FREQUENCIES, _LONG, _SHORT})
"""Tensors that become part of the configuration."""

_KNOWN = frozenset(
    (
        *("freq_base", "freq_base_swa", "dimension_count", "scale_linear"),
        *(f"scaling.{name}" for name in ("type", "factor", "original_context_length", "attn_factor", "finetuned")),
        *(f"scaling.yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")),
    )
)
_LOW, _HIGH = 1.0, 4.0
"""The bounds of Llama 3's interpolation; all its models have these."""


def rope_parameters(config: Any, header: GgufHeader) -> None:
    """Set a configuration's rotary embedding to the file's.

    Raises:
        InputError: It is of a kind that the model's class, or edgemix, does not know.
    """
    stated = {key.removeprefix("rope."): value for key, value in header.stated.items() if key.startswith("rope.")}
    usual = getattr(config, "rope_parameters", None)
    unknown = sorted(stated.keys() - _KNOWN) if usual is not None else sorted(stated)
    if unknown:
        raise _refused(header, f"{header.architecture}.rope.{unknown[0]}")
    if usual is None:
        return
    nested = usual if "full_attention" in usual else None
    usual = nested["full_attention"] if nested else usual
    parameters: dict[str, Any] = {"rope_theta": float(stated.get("freq_base", 10_000.0))}
    parameters |= _partial(config, header, stated, usual)
    parameters |= _scaling(config, header, stated, parameters)
    if parameters["rope_type"] == "yarn" and "truncate" in usual:
        parameters["truncate"] = usual["truncate"]
    if nested:
        local = {"rope_type": "default", "rope_theta": float(stated.get("freq_base_swa", 10_000.0))}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    config.rope_parameters = parameters
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = _trained(config, stated)


def _partial(config: Any, header: GgufHeader, stated: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, float]:
    """Return the part of a head that is rotated, if the model's class can rotate a part."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dimensions = stated.get("dimension_count", head)
    if "partial_rotary_factor" in usual and 0 < dimensions <= head:
        return {"partial_rotary_factor": dimensions / head}
    if dimensions != head:
        raise _refused(header, f"{header.architecture}.rope.dimension_count {dimensions} of heads of {head}")
    return {}


def _scaling(
    config: Any, header: GgufHeader, stated: Mapping[str, Any], parameters: Mapping[str, float]
) -> dict[str, Any]:
    factor = stated.get("scaling.factor", stated.get("scale_linear", 0)) or 1.0
    kind = stated.get("scaling.type", "linear" if factor != 1 else "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise _refused(header, f"{header.architecture}.rope.scaling.type {kind!r:.60}")
    factor = 1.0 if kind == "none" else float(factor)
    if not factor > 0:
        raise InputError(f"{header.name}: {header.architecture}.rope.scaling.factor is {factor}", DAMAGED)
    strength = stated.get("scaling.attn_factor", 1.0)
    found = ROPE_TENSORS & header.tensors.keys()
    if kind == "longrope" or found & {_LONG, _SHORT}:
        return _long(config, header, stated, factor, strength)
    if strength != 1:
        raise _refused(header, f"{header.architecture}.rope.scaling.attn_factor {strength}")
    if kind == "yarn":
        if found:
            raise _refused(header, f"{_FREQUENCIES} beside yarn")
        return _yarn(config, header, stated, factor)
    if found:
        return _frequencies(config, header, parameters, factor)
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(config: Any, header: GgufHeader, stated: Mapping[str, Any], factor: float) -> dict[str, Any]:
    for key in ("scaling.yarn_ext_factor", "scaling.yarn_attn_factor"):
        if stated.get(key, 1.0) != 1:
            raise _refused(header, f"{header.architecture}.rope.{key} {stated[key]}")
    betas = {
        name: stated[f"scaling.yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"scaling.yarn_{name}" in stated
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _trained(config, stated),
        **betas,
    }


def _long(config: Any, header: GgufHeader, stated: Mapping[str, Any], factor: float, strength: float) -> dict[str, Any]:
    if factor != 1 or _FREQUENCIES in header.tensors:
        raise _refused(header, f"{header.architecture}.rope.scaling.factor beside {_LONG}")
    return {
        "rope_type": "longrope",
        "short_factor": _factors(config, header, _SHORT).tolist(),
        "long_factor": _factors(config, header, _LONG).tolist(),
        "original_max_position_embeddings": _trained(config, stated),
        "attention_factor": strength,
    }


def _frequencies(config: Any, header: GgufHeader, parameters: Mapping[str, float], factor: float) -> dict[str, Any]:
    """Return the divisors of the frequencies as Llama 3 computes them, or as they are."""
    divisors = _factors(config, header, _FREQUENCIES) * factor
    if np.allclose(divisors, divisors[0], rtol=1e-6):
        return {"rope_type": "linear", "factor": float(divisors[0])} if divisors[0] != 1 else {"rope_type": "default"}
    size = 2 * len(divisors)
    waves = 2 * math.pi * parameters["rope_theta"] ** (np.arange(0, size, 2) / size)
    for trained in (8192, *(1 << power for power in range(6, 21))):
        inner = np.clip((trained / waves - _LOW) / (_HIGH - _LOW), 0, 1)
        largest = float(divisors.max())
        if np.allclose(divisors, 1 / ((1 - inner) / largest + inner), rtol=1e-4):
            low, high = {"low_freq_factor": _LOW, "high_freq_factor": _HIGH}.items()
            scaling = {"factor": largest, "original_max_position_embeddings": trained}
            return {"rope_type": "llama3", **scaling, **dict((low, high))}
    return {
        "rope_type": "longrope",
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": config.max_position_embeddings,
        "attention_factor": 1.0,
    }


def _factors(config: Any, header: GgufHeader, name: str) -> np.ndarray:
    """Return the values of a tensor of factors, one for each pair of rotated dimensions."""
    from gguf import GGMLQuantizationType

    if name not in header.tensors:
        raise InputError(f"{header.name}: the tensor {name} is missing", DAMAGED)
    tensor = header.tensors[name]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = header.stated.get("rope.dimension_count", head) // 2
    values = header.values(tensor) if tensor.kind == GGMLQuantizationType.F32 else None
    if values is None or tensor.shape != (pairs,) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"{header.name}: {name} is not {pairs} positive numbers in F32", DAMAGED)
    return values.astype(np.float64)


def _trained(config: Any, stated: Mapping[str, Any]) -> int:
    return int(stated.get("scaling.original_context_length", config.max_position_embeddings))


def _refused(header: GgufHeader, what: str) -> InputError:
    return InputError(
        f"{header.name}: its rotary embedding has {what}, which is not supported",
        "Give the model's Hugging Face folder.",
    )
