"""Load the members of a mixture over labels: models with their heads, tokenizers, and the mixture's names of labels."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemix.bundle.label_bundle.manifest import MemberTokenizer, member_folder
from edgemix.bundle.manifest import ModelSource
from edgemix.bundle.tokenizer_identity import TokenizerIdentity
from edgemix.errors import InputError
from edgemix.export.models.adapters.merging import merge_adapter
from edgemix.export.models.loading import load_model, load_tokenizer, stated_license
from edgemix.export.models.location import locate
from edgemix.export.models.verification import check_finite

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.recipe.labels import LabelMemberRecipe, LabelRecipe

LONGEST = 512
"""Most tokens of a text where neither the recipe nor the model says less."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNLIMITED = 1 << 20
"""Lengths from here on mean that a tokenizer states none."""


@dataclass(frozen=True)
class LoadedClassifier:
    """A loaded member.

    Attributes:
        name: Its name.
        model: In fp32 on the CPU, its adapter merged.
        tokenizer: Its own.
        source: Where it came from.
        labels: For each column of its logits the mixture's name; empty for fill-mask.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    labels: tuple[str, ...]


def load_classifier(spec: LabelMemberRecipe, recipe: LabelRecipe) -> LoadedClassifier:
    """Load a member that is a model.

    Raises:
        InputError: Its files cannot be read, its head is not the task's, or its labels are not the recipe's.
    """
    location = locate(spec.model or "", recipe.folder)
    adapter = locate(spec.adapter, recipe.folder) if spec.adapter else None
    model = load_model(location, task=recipe.task)
    digest = location.sha256() + (adapter.sha256() if adapter else "")
    if adapter:
        model = merge_adapter(copy.deepcopy(model), adapter)
        check_finite(f"{location.name} with {adapter.name}", model)
    source = ModelSource(
        model=location.name,
        model_type=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sha256=hashlib.sha256(digest.encode()).hexdigest(),
        adapter=adapter.name if adapter else None,
        license=stated_license(location),
    )
    labels = () if recipe.task == "fill-mask" else member_labels(spec, model.config, recipe)
    return LoadedClassifier(spec.name, model, load_tokenizer(location), source, labels)


def member_labels(spec: LabelMemberRecipe, config: Any, recipe: LabelRecipe) -> tuple[str, ...]:
    """Return the mixture's names of a model's labels, by column.

    Raises:
        InputError: The recipe renames a label that the model does not have, or two get one name, or one is none of the
            recipe's labels.
    """
    stated = getattr(config, "id2label", None) or {}
    own = [str(stated.get(column, column)) for column in range(config.num_labels)]
    renamed = {name: new for name, new in spec.labels.items() if name in own}
    columns = {str(column): own[column] for column in range(len(own))}
    unknown = [name for name in spec.labels if name not in own and name not in columns]
    if unknown:
        raise InputError(
            f"{spec.name}: the recipe renames {', '.join(unknown)}, and the model's labels are {', '.join(own)}",
            f"Correct the names under labels: of {spec.name}; a number stands for the label of that column.",
        )
    renamed |= {columns[name]: new for name, new in spec.labels.items() if name in columns and name not in own}
    labels = tuple(renamed.get(name, name) for name in own)
    if len(set(labels)) < len(labels):
        raise InputError(f"{spec.name}: two of its labels have one name: {', '.join(labels)}", "Rename one of them.")
    if recipe.labels and (others := [name for name in labels if name not in recipe.labels]):
        raise InputError(
            f"{spec.name}: its labels are {', '.join(labels)}; {', '.join(others)} are none of the recipe's, which are "
            f"{', '.join(recipe.labels)}",
            f"Give the labels' names under labels: of {spec.name}, or leave the recipe's labels: out.",
        )
    return labels


def longest_text(member: LoadedClassifier, most: int | None) -> int:
    """Return the most tokens of a text that a member reads: the recipe's number, at most what the model can."""
    config = member.model.config
    limits = [most or LONGEST, *_positions(member.model)]
    stated = getattr(member.tokenizer, "model_max_length", _UNLIMITED)
    if stated < _UNLIMITED:
        limits.append(stated)
    found = min(limits)
    if most is not None and found < most:
        raise InputError(
            f"{member.name}: max_length is {most}, and models of type {config.model_type} like it read {found} tokens"
        )
    return int(found)


def _positions(model: PreTrainedModel) -> list[int]:
    """Return how many tokens a model has positions for, if it says so."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return [module.num_embeddings - offset]
    stated = getattr(model.config, "max_position_embeddings", None)
    return [stated] if isinstance(stated, int) and stated > 0 else []


def save_tokenizer(member: LoadedClassifier, bundle: Path, most: int | None) -> MemberTokenizer:
    """Write a member's tokenizer to the bundle, and return its entry in the manifest.

    Raises:
        InputError: It is beyond the bounds of bundles.
    """
    path = f"{member_folder(member.name)}/tokenizer.json"
    file = bundle / path
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = member.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.save(str(file))
    special = {name: str(token) for name in _SPECIAL if (token := getattr(tokenizer, name, None)) is not None}
    return MemberTokenizer(
        path=path,
        sha256=TokenizerIdentity.parse(file.read_bytes()).sha256(),
        vocabulary=member.model.config.get_text_config().vocab_size,
        max_length=longest_text(member, most),
        special_tokens=special,  # type: ignore[arg-type]
        pad_type_id=getattr(tokenizer, "pad_token_type_id", 0) or 0,
        padding_side="left" if tokenizer.padding_side == "left" else "right",
    )
