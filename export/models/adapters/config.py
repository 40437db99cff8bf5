"""Read adapter_config.json, and refuse what cannot be merged into a model's weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from edgemix.errors import InputError
from edgemix.export.models.checkpoint import read_object
from edgemix.export.models.location import reading

if TYPE_CHECKING:
    from peft import LoraConfig

    from edgemix.export.models.location import Location

ADAPTER_CONFIG = "adapter_config.json"

_Names: TypeAlias = list[str] | str | None


class _Known(msgspec.Struct, frozen=True):
    """The keys that edgemix merges rightly, whatever their value; PEFT has the defaults."""

    alpha_pattern: dict[str, float] | None = None
    auto_mapping: Any = None
    base_model_name_or_path: str | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    ensure_weight_tying: bool | None = None
    exclude_modules: _Names = None
    fan_in_fan_out: bool | None = None
    inference_mode: bool | None = None
    init_lora_weights: bool | str | None = None
    layers_pattern: _Names = None
    layers_to_transform: list[int] | int | None = None
    lora_alpha: float | None = None
    lora_bias: bool | None = None
    lora_dropout: float | None = None
    modules_to_save: list[str] | None = None
    peft_type: str | None = None
    peft_version: str | None = None
    r: int | None = None
    rank_pattern: dict[str, int] | None = None
    revision: str | None = None
    target_modules: _Names = None
    target_parameters: list[str] | None = None
    task_type: str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None


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
        if value and key not in _INITIAL.union(_Known.__struct_fields__):
            raise InputError(
                f"{adapter.name}: {ADAPTER_CONFIG} sets {key}, which is not known",
                "Merge the adapter with the library that trained it, or remove a key of the training only.",
            )
    known = _checked_types(adapter.name, stated)
    _check_patterns(adapter.name, known)
    initialization = _checked_initialization(adapter.name, known, trainable=trainable)
    with reading(adapter):
        config: LoraConfig = PeftConfig.from_peft_type(**known | {"init_lora_weights": initialization})
    config.inference_mode = not trainable
    return config


def _checked_types(name: str, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the known keys that are stated."""
    try:
        known = msgspec.structs.asdict(msgspec.convert(stated, _Known))
    except msgspec.ValidationError as error:
        raise InputError(f"{name}: {ADAPTER_CONFIG}: {error}", "Download or save the adapter again.") from error
    return {key: value for key, value in known.items() if value is not None}


def _checked_initialization(name: str, stated: dict[str, Any], *, trainable: bool) -> bool | str:
    """Return how PEFT initializes the adapter before its weights are read."""
    method = stated.get("init_lora_weights", True)
    if method in _INITIALIZATIONS:
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
