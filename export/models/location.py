"""Find a model or an adapter on this machine: a Hugging Face folder, a GGUF file, or a hub id, which is downloaded."""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemix.errors import EdgemixError, InputError
from edgemix.export.library_warnings import collected
from edgemix.export.models.checkpoint import refuse_quantized
from edgemix.files import hash_file
from edgemix.recipe.validation import local_path

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


@dataclass(frozen=True)
class Location:
    """The files of a model or an adapter on this machine: a folder, or one GGUF file in it.

    Attributes:
        folder: The folder.
        gguf: Name of the GGUF file, if it is one.
        name: Its name in the manifest, without this machine's folders.
    """

    folder: Path
    gguf: str | None
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for transformers' `from_pretrained`, which then reads local files only."""
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True}
        return source | ({"gguf_file": self.gguf} if self.gguf else {})

    def weight_files(self) -> list[Path]:
        """Return the files of the weights, in a fixed order.

        Raises:
            InputError: There are no weights in safetensors or GGUF.
        """
        if self.gguf:
            return [self.folder / self.gguf]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            found = sorted(p.name for p in self.folder.glob("*.bin"))
            remedy = "edgemix reads safetensors only, never pickled weights: save the model with save_pretrained()."
            raise InputError(f"{self.name}: no .safetensors file{f', only {found[0]}' if found else ''}", remedy)
        return files

    def sha256(self) -> str:
        """Return a digest of the weights, the configuration and the tokenizer; equal digests load equal members."""
        small = [] if self.gguf else sorted(self.folder.glob("*.json")) + sorted(self.folder.glob("*.jinja"))
        digest = hashlib.sha256()
        for file in self.weight_files() + small:
            digest.update(f"{file.name} {hash_file(file).sha256}\n".encode())
        return digest.hexdigest()


def locate(model: str, folder: Path) -> Location:
    """Find a recipe's `model` or `adapter`: a path relative to `folder` first, then a hub id, which is downloaded.

    Raises:
        InputError: It is neither, the hub does not have it or cannot be reached, or its weights are already quantized.
    """
    path = local_path(model, folder)
    if path is None:
        return Location(_download(model), None, model)
    if path.is_dir():
        name = path.name if path.is_symlink() else path.resolve().name
        refuse_quantized(path, name)
        return Location(path.resolve(), None, name)
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{model}: a file, but not a .gguf file", "Give a Hugging Face folder or a .gguf file.")
    # A link keeps its own name: hubs keep files as blobs/SHA.
    return Location(path.parent.resolve(), path.name, path.name)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        refuse_quantized(Path(snapshot_download(repository, allow_patterns="*.json")), repository)
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise InputError(f"{repository}: no such folder, and not a hub id ({error})") from None
    except LocalEntryNotFoundError:
        remedy = "Give a local folder, or run once with a network so that the model is in the hub's cache."
        raise InputError(f"{repository}: no such folder, and the model hub cannot be reached", remedy) from None
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repository}: no such folder, and the model hub answered: {first}") from None


@contextmanager
def reading(location: Location) -> Iterator[list[str]]:
    """Turn the errors of model libraries into an InputError that keeps their first line, and collect their warnings.

    Yields:
        The warnings so far, to which the caller may add.
    """
    warned: list[str] = []
    try:
        with collected(location.name) as warned:
            yield warned
    except (EdgemixError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[0] if lines else "no message"
        if "trust_remote_code" in str(error):
            detail = "it needs code of its own repository, which edgemix never runs"
        if parts := re.findall(r"^(\S.*?) *\| *CONVERSION", "\n".join(warned), re.MULTILINE):
            detail = f"some of the tensors that make up {', '.join(parts)} are missing or of other shapes"
        raise InputError(f"{location.name}: cannot be read: {type(error).__name__}: {detail}") from error
