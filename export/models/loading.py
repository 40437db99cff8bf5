"""Load members: their models and tokenizers, LoRA adapters merged.

Weights come from safetensors and GGUF files only: nothing is unpickled, and no code of a model's repository runs.
"""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edgemix.bundle.manifest import ModelSource
from edgemix.errors import InputError
from edgemix.export.models.adapters import merge_adapter
from edgemix.export.models.adapters.tokenizer import adapted_tokenizer, stated_end_ids
from edgemix.export.models.checkpoint import Checkpoint, counted, read_checkpoint, refuse_embedded_adapter
from edgemix.export.models.gguf_cache import gguf_parsed_once
from edgemix.export.models.gguf_config import check_sizes, check_tensors, stated_config
from edgemix.export.models.gguf_header import gguf_header
from edgemix.export.models.gguf_tokenizer import end_token_ids, gguf_tokenizer
from edgemix.export.models.location import Location, locate, reading
from edgemix.export.models.tokenizers import drop_absent_end
from edgemix.export.models.verification import check_finite, check_report, check_weights
from edgemix.progress import NO_PROGRESS, PrefixedProgress, Progress
from edgemix.tasks import DEFAULT_TASK, TASKS, TaskName
from edgemix.tokenizer_files.document import checked_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemix.recipe.schema import MemberRecipe


@dataclass(frozen=True)
class LoadedMember:
    """A member in memory: an fp32 torch model in evaluation mode on the CPU, adapter merged, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource


@dataclass(frozen=True)
class _Base:
    """A model as it was read, shared by all adapters on it."""

    location: Location
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    license: str | None


class MemberLoader:
    """Load members one after the other; the last base model is kept for the next adapter on it."""

    def __init__(self, folder: Path, progress: Progress = NO_PROGRESS) -> None:
        self._folder = folder
        self._progress = progress
        self._base: _Base | None = None

    def load(self, spec: MemberRecipe) -> LoadedMember:
        """Load one member of a recipe.

        Raises:
            InputError: The files are missing, damaged, pickled, or of a model type that transformers does not know.
        """
        location = locate(spec.model, self._folder)
        adapter = locate(spec.adapter, self._folder) if spec.adapter else None
        with PrefixedProgress(self._progress, spec.name).stage(f"load {location.name}"):
            digest = location.sha256() + (adapter.sha256() if adapter else "")
            base = self._load_base(location)
            model = merge_adapter(copy.deepcopy(base.model), adapter) if adapter else base.model
            tokenizer = base.tokenizer
            if adapter:
                check_finite(f"{location.name} with {adapter.name}", model)
                tokenizer = adapted_tokenizer(tokenizer, adapter, load_tokenizer)
                if (ends := stated_end_ids(adapter, model.config.get_text_config().vocab_size)) is not None:
                    model.generation_config.eos_token_id = ends
        source = ModelSource(
            model=location.name,
            model_type=model.config.model_type,
            parameters=sum(p.numel() for p in model.parameters()),
            sha256=hashlib.sha256(digest.encode()).hexdigest(),
            adapter=adapter.name if adapter else None,
            license=base.license,
        )
        return LoadedMember(spec.name, model, tokenizer, source)

    def _load_base(self, location: Location) -> _Base:
        if self._base is None or self._base.location != location:
            self._base = None  # free the last one before the next is read
            with gguf_parsed_once() if location.gguf else nullcontext():
                self._base = _Base(location, load_model(location), load_tokenizer(location), stated_license(location))
        return self._base


def load_member(spec: MemberRecipe, folder: Path, progress: Progress = NO_PROGRESS) -> LoadedMember:
    """Load one member; see `MemberLoader.load`."""
    return MemberLoader(folder, progress).load(spec)


def load_model(location: Location, *, quantization: Any = None, task: TaskName = DEFAULT_TASK) -> PreTrainedModel:
    """Load a model as fp32 on the CPU, weights dequantized, in evaluation mode.

    Args:
        location: Its files.
        quantization: transformers' configuration of a quantization that is applied to each weight as it is read, so
            that the weights are never in memory as a whole; not for GGUF files.
        task: The task, which decides the model's head.

    Raises:
        InputError: See `MemberLoader.load`.
    """
    location.weight_files()
    if location.gguf:
        refuse_embedded_adapter(location.folder, location.name)
    files = None if location.gguf else read_checkpoint(location.folder, location.name)
    with reading(location) as warned:
        config, loader = _class_of(location, task)
        if location.gguf:
            with torch.device("meta"):
                check_tensors(loader.from_config(config, trust_remote_code=False), gguf_header(location))
        model, info = loader.from_pretrained(
            **location.arguments,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **({} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}),
        )
        check_report(location.name, info, model, files)
        if files is None:
            check_finite(location.name, model)
        else:
            aside = check_weights(location.name, files, model, quantized=quantization is not None)
            warned.extend(_unused(files, aside))
    if location.gguf:
        if getattr(model, "hf_quantizer", None) is not None:
            _clear_quantization(model)
        model.generation_config.eos_token_id = end_token_ids(gguf_header(location))
    _record_tying(model)
    return model.eval().requires_grad_(False)


def _unused(files: Checkpoint, aside: list[str]) -> list[str]:
    """Return warnings about what a folder holds and the model does not."""
    lines = [f"{', '.join(files.unread)}: not read, as the weights are in other files"] if files.unread else []
    return lines + ([f"models of its type do not use {counted(aside)}"] if aside else [])


def _record_tying(model: PreTrainedModel) -> None:
    """State in the configuration whether the head is the embedding: transformers keeps both where a file's differ."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def load_skeleton(location: Location, *, task: TaskName = DEFAULT_TASK) -> PreTrainedModel:
    """Build a model without its weights, on torch's meta device.

    Raises:
        InputError: See `MemberLoader.load`.
    """
    with reading(location), torch.device("meta"):
        config, loader = _class_of(location, task)
        return loader.from_config(config, trust_remote_code=False)


def _class_of(location: Location, task: TaskName) -> tuple[Any, Any]:
    """Return a model's configuration and the class of transformers that loads it with the head of a task."""
    if location.gguf:
        check_sizes(gguf_header(location))
    config = AutoConfig.from_pretrained(**location.arguments, trust_remote_code=False)
    if location.gguf:
        config = stated_config(config, gguf_header(location))
    return config, getattr(transformers, TASKS[task].auto_class)


def _clear_quantization(model: PreTrainedModel) -> None:
    """Remove the marks of quantization from a GGUF file's model, whose weights are plain floats once they are read."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    del model.config.quantization_config


def load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """Read a fast tokenizer.

    Raises:
        InputError: There is no tokenizer, or no fast one.
    """
    with reading(location):
        if location.gguf:
            return gguf_tokenizer(gguf_header(location))
        # AutoTokenizer rebuilds tokenizers of some classes, without the pre-tokenizer of their tokenizer.json.
        written = (file := location.folder / "tokenizer.json").is_file()
        if written:
            checked_text(file)
        kind = PreTrainedTokenizerFast if written else AutoTokenizer
        tokenizer = kind.from_pretrained(**location.arguments, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{location.name}: its tokenizer cannot be written as tokenizer.json", "Convert it to a fast tokenizer."
        )
    drop_absent_end(tokenizer, location.folder)
    return tokenizer


def member_tokenizer(
    spec: MemberRecipe, folder: Path, read: Callable[[Location], PreTrainedTokenizerBase] = load_tokenizer
) -> PreTrainedTokenizerBase:
    """Read a member's tokenizer: its model's, with what its adapter's folder changes.

    Args:
        spec: The member.
        folder: The recipe's folder.
        read: Reads a tokenizer; a cache of `load_tokenizer` where members share a model.

    Raises:
        InputError: See `load_tokenizer`; or the adapter has another tokenizer than its model.
    """
    tokenizer = read(locate(spec.model, folder))
    return adapted_tokenizer(tokenizer, locate(spec.adapter, folder), read) if spec.adapter else tokenizer


def end_ids(member: LoadedMember) -> set[int]:
    """Return the ids that end a generation: the tokenizer's and those of the model's generation settings."""
    stated = getattr(member.model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return {i for i in [*ids, member.tokenizer.eos_token_id] if i is not None}


def stated_license(location: Location) -> str | None:
    """Return the license that the model's card or its GGUF metadata states."""
    if location.gguf:
        stated = gguf_header(location).metadata.get("general.license")
        return str(stated) if stated else None
    card = location.folder / "README.md"
    if card.is_file():
        for line in card.read_text(errors="replace").splitlines()[:40]:
            key, _, value = line.partition(":")
            if key.strip().lower() == "license" and value.strip():
                return value.strip().strip("\"'")
    return None


def versions() -> dict[str, str]:
    """Return the versions of the libraries that an export depends on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "mobius-onnx", "onnx-ir", "onnxruntime", "peft", "bitsandbytes")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # onnxruntime-gpu stands in for onnxruntime
            continue
    return found
