"""Read adapter_config.json, and refuse what cannot be merged into a model's weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgemix.errors import InputError
from edgemix.export.models.checkpoint import read_object
from edgemix.export.models.location import reading

if TYPE_CHECKING:
    from peft import LoraConfig

    from edgemix.export.models.location import Location

ADAPTER_CONFIG = "adapter_config.json"

_KNOWN = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
        *("alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "lora_alpha", "lora_bias", "lora_dropout"),
        *("layers_pattern", "layers_to_transform", "modules_to_save", "r", "rank_pattern", "target_modules"),
        *("ensure_weight_tying", "init_lora_weights", "target_parameters", "task_type", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
    )
)
"""Keys that edgemix merges rightly, whatever their value."""

_INITIAL = frozenset(
    (
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    )
)
"""Keys that only matter to a training's beginning, or beside another key."""

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA changes only the tokens after its invocation",
    "arrow_config": "a router chooses among several adapters",
    "kasa_config": "KaSA is no plain LoRA",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is for Megatron, and would import a module of its own choice",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "block-diagonal LoRA is no plain LoRA",
    "use_qalora": "QA-LoRA is for weights in groups of a quantization",
    "velora_config": "VeLoRA is no plain LoRA",
}
"""Keys whose adapters are refused, and why."""

_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to initialize an adapter that leave its base as it is."""

_BASE_CHANGED = ("pissa", "olora")
"""Ways that take the initial adapter away from the base's weights, and do the same again when it is loaded."""

_PATTERNS = ("exclude_modules", "layers_pattern", "target_modules")
_MAX_PATTERN, _MAX_REPETITIONS = 4096, 6
"""Characters, and repetitions, of a regular expression; more may take forever to match."""


def read_config(adapter: Location, *, trainable: bool = False) -> LoraConfig:
    """Read an adapter's configuration.

    Args:
        adapter: Its folder.
        trainable: Whether it will be trained, on a base that others share.

    Raises:
        InputError: It is not a LoRA adapter's, or one that cannot be merged; the message names the key.
    """
    from peft import PeftConfig

    stated = read_object(adapter.folder / ADAPTER_CONFIG, adapter.name)
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{adapter.name}: a {kind or 'nameless'} adapter; edgemix merges LoRA adapters")
    for key, value in stated.items():
        if value and key in _REFUSED:
            raise InputError(
                f"{adapter.name}: an adapter with {key} cannot be merged: {_REFUSED[key]}",
                "Train a plain LoRA adapter.",
            )
        if value and key not in _KNOWN | _INITIAL:
            raise InputError(
                f"{adapter.name}: {ADAPTER_CONFIG} sets {key}, which is not known",
                "Merge the adapter with the library that trained it, or remove a key of the training only.",
            )
    _check_patterns(adapter.name, stated)
    initialization = _checked_initialization(adapter.name, stated, trainable=trainable)
    with reading(adapter):
        for key in _INITIAL:
            stated.pop(key, None)
        config: LoraConfig = PeftConfig.from_peft_type(**stated | {"init_lora_weights": initialization})
    config.inference_mode = not trainable
    return config


def _checked_initialization(name: str, stated: dict[str, Any], *, trainable: bool) -> bool | str:
    """Return how PEFT initializes the adapter before its weights are read."""
    method = stated.get("init_lora_weights", True)
    if method in _INITIALIZATIONS or method is None:
        return True
    if method not in _BASE_CHANGED:
        raise InputError(
            f"{name}: an adapter initialized by {method!r} belongs to a changed base, which cannot be computed again",
            "Save it again with path_initial_model_for_weight_conversion, which makes it a plain adapter.",
        )
    if trainable:
        raise InputError(
            f"{name}: an adapter initialized by {method!r} changes its base, and cannot be trained further",
            "Merge it into its base model first, and name that as the member's model.",
        )
    return str(method)


def _check_patterns(name: str, stated: dict[str, Any]) -> None:
    """Refuse regular expressions that may take forever."""
    patterns = [(key, stated.get(key)) for key in _PATTERNS]
    patterns += [(key, each) for key in ("alpha_pattern", "rank_pattern") for each in stated.get(key) or ()]
    for key, pattern in patterns:
        if not isinstance(pattern, str):
            continue
        if (
            len(pattern) > _MAX_PATTERN
            or re.search(r"\)[*+{]", pattern)
            or len(re.findall(r"[^\\][*+{]", pattern)) > _MAX_REPETITIONS
        ):
            raise InputError(
                f"{name}: the regular expression of {key} has repeated groups, more than {_MAX_REPETITIONS} "
                f"repetitions or more than {_MAX_PATTERN:,} characters",
                "List the modules' names instead.",
            )
