"""The safetensors files of a Hugging Face folder, read without transformers: which count, and what they hold.

What is refused here would otherwise be loaded as another model, without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import safetensors

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"

_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json: transformers', early compressed-tensors', MLX'."""
_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files of quantizers that leave config.json as it is."""

_FLOATS = ("F16", "BF16", "F32", "F64")
_MOST_NAMES = 3


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where it is, its safetensors dtype ("BF16") and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it holds plain numbers, not the codes of a quantization."""
        return self.dtype in _FLOATS


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        tensors: The tensors of all files that transformers reads.
        unread: Names of the other safetensors files in the folder.
    """

    tensors: dict[str, StoredTensor]
    unread: list[str]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, one after the other."""
        for path in dict.fromkeys(each.file for each in self.tensors.values()):
            with safetensors.safe_open(path, "pt") as file:
                for name, stored in self.tensors.items():
                    if stored.file == path:
                        yield name, file.get_tensor(name)


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read the headers of a folder's weights.

    Args:
        folder: The folder.
        name: Its name in messages.

    Raises:
        InputError: The weights are quantized, incomplete, or there are two sets of them.
    """
    refuse_quantized(folder, name)
    refuse_embedded_adapter(folder, name)
    if other := read_object(folder / _CONFIG, name).get("transformers_weights"):
        raise InputError(
            f"{name}: config.json names other weights: transformers_weights is {other!r}",
            f"Remove that entry, and call the file {_WEIGHTS}.",
        )
    whole, index = _weights_files(folder, name)
    files = [whole] if index is None else sorted({folder / file for file in index.values()})
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for tensor, stored in read_header(path, name).items():
            if tensor in tensors:
                other = tensors[tensor].file.name
                raise InputError(f"{name}: two files hold the tensor {tensor}: {other} and {path.name}")
            tensors[tensor] = stored
    if index is not None and (lost := [tensor for tensor in index if tensor not in tensors]):
        raise InputError(
            f"{name}: {_INDEX} names {counted(lost)} that no file holds", "Download or save the model again."
        )
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    return Checkpoint(tensors, unread)


def refuse_quantized(folder: Path, name: str) -> None:
    """Refuse a model whose weights are already quantized; only small files are read.

    Raises:
        InputError: It is quantized; the message names the method.
    """
    config = read_object(folder / _CONFIG, name) if (folder / _CONFIG).is_file() else {}
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for key in _QUANTIZATION_KEYS:
            if settings := part.get(key):
                raise _already_quantized(name, _method(settings if isinstance(settings, dict) else {}, key))
    for file, method in _QUANTIZATION_FILES.items():
        if (folder / file).is_file():
            raise _already_quantized(name, f"{method}, as {file} says")


def refuse_embedded_adapter(folder: Path, name: str) -> None:
    """Refuse a model's folder that holds an adapter, too: transformers would put it on top without a word.

    Raises:
        InputError: There is an adapter_config.json.
    """
    if not (folder / _ADAPTER).is_file():
        return
    if not (folder / _CONFIG).is_file():
        raise InputError(
            f"{name}: a LoRA adapter, not a model",
            "Give the model that it was trained on, and this folder as its adapter.",
        )
    raise InputError(
        f"{name}: an adapter ({_ADAPTER}) lies beside the model's own weights, which may have it merged already",
        "Move the adapter's files to a folder of their own, and name that as the adapter if it is not merged.",
    )


def counted(names: list[str]) -> str:
    """Return a list of tensors as text: how many, and the first names."""
    shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _method(settings: dict[str, Any], key: str) -> str:
    """Return the name of a quantization, with its bits where they are stated."""
    method = settings.get("quant_method") or settings.get("quant_algo")
    if method is None and key == "quantization":
        method = "MLX"
    if method is None and any("load_in_" in each for each in settings):
        method = "bitsandbytes"
    bits = settings.get("bits") or settings.get("w_bit")
    for each in (4, 8):
        bits = each if settings.get(f"load_in_{each}bit") else bits
    return f"{method or 'its method is not stated'}{f', {bits} bits' if bits else ''}"


def _already_quantized(name: str, method: str) -> InputError:
    return InputError(
        f"{name}: its weights are already quantized ({method})", "Give the unquantized model, or a GGUF file."
    )


def _weights_files(folder: Path, name: str) -> tuple[Path, dict[str, str] | None]:
    """Return a model's only file, and None; or the place of such a file, and the index: the file of each tensor."""
    whole, path = folder / _WEIGHTS, folder / _INDEX
    if not path.is_file():
        if not whole.is_file():
            found = sorted(each.name for each in folder.glob("*.safetensors"))
            raise InputError(
                f"{name}: there is neither {_WEIGHTS} nor {_INDEX}, only {', '.join(found[:_MOST_NAMES])}",
                "Save the model with save_pretrained(), or download it again.",
            )
        return whole, None
    index = _index(path, name)
    files = sorted(set(index.values()))
    lost = [file for file in files if not (folder / file).is_file()]
    if whole.is_file() and files != [_WEIGHTS]:
        if len(lost) == len(files):
            return whole, None  # the index was left by an earlier save in several files
        raise InputError(
            f"{name}: two sets of weights: {_WEIGHTS}, and the files that {_INDEX} names",
            "Remove the set that is not the model.",
        )
    if lost:
        raise InputError(
            f"{name}: {len(lost)} of {len(files)} files of the weights are missing: {', '.join(lost[:_MOST_NAMES])}",
            "Download or copy the model again.",
        )
    return whole, index


def _index(path: Path, name: str) -> dict[str, str]:
    """Read the index of a model in several files: the file of each tensor."""
    stated = read_object(path, name).get("weight_map")
    if not isinstance(stated, dict) or not stated or not all(isinstance(file, str) for file in stated.values()):
        raise InputError(f"{name}: {_INDEX} has no weight_map", "Download or save the model again.")
    for file in stated.values():
        if not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise InputError(f"{name}: {_INDEX} names {file!r}, which is no .safetensors file of the folder")
    return stated


def read_header(path: Path, name: str) -> dict[str, StoredTensor]:
    """Read the names, dtypes and shapes of a safetensors file's tensors.

    Raises:
        InputError: It is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            parts = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 - it has no __iter__
            return {
                tensor: StoredTensor(path, str(part.get_dtype()), tuple(part.get_shape()))
                for tensor, part in parts.items()
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{name}: {path.name} cannot be read: {error}", "Download or save the model again.") from error


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: {path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{name}: {path.name} is not a JSON object")
    return found
