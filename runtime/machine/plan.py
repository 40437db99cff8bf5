"""Plans: the fastest measured settings for a bundle on a machine (`edgemix profile --recommend`).

Plans are files in the user's cache folder, by bundle manifest, processor, number of cores, ONNX Runtime version and
provider. They are advice: one that cannot be read is ignored.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from edgemix.errors import EdgemixError, storage_errors
from edgemix.files import write_atomically
from edgemix.runtime.options import Speculation
from edgemix.runtime.processor import installed_version, processor

if TYPE_CHECKING:
    from edgemix.bundle.manifest import Manifest
    from edgemix.runtime.graphs.providers import Provider

LOG = logging.getLogger(__name__)

CACHE = "EDGEMIX_CACHE"
"""Environment variable: the folder of edgemix's cache."""
SCHEMA = 1
_MOST_BYTES = 1 << 16
_MOST_THREADS = 1 << 12


class RuntimePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings for running a mixture.

    Attributes:
        key: What it applies to, see `key_of`.
        threads: Threads within an operator.
        speculation: The mode that "auto" stands for.
        drafts: Whether the student is loaded beside the members.
        tpot: Measured seconds per token.
        created: Time of measurement, ISO 8601 in UTC.
    """

    key: str
    threads: int
    speculation: Speculation
    drafts: bool
    tpot: float
    created: str
    schema: int = SCHEMA


def cache_folder() -> Path | None:
    """Return the folder of edgemix's cache, which need not exist; None where the user has no home."""
    if named := os.environ.get(CACHE):
        return Path(named)
    try:
        return platformdirs.user_cache_path("edgemix", appauthor=False, opinion=False)
    except RuntimeError:  # a user without a home
        return None


def key_of(manifest: Manifest, provider: Provider) -> str:
    """Return everything that a plan depends on, in one line."""
    here = processor()
    versions = (f"{name} {installed_version(name)}" for name in ("onnxruntime", "onnxruntime-gpu"))
    return " | ".join(
        (manifest.checksum, here.name, f"{here.default_threads} of {here.usable_cores} cores", *versions, provider.name)
    )


def find_plan(manifest: Manifest, provider: Provider) -> RuntimePlan | None:
    """Return the plan for a bundle on this machine, if there is a valid one; an invalid one is logged."""
    folder = _plans()
    if folder is None or not folder.is_dir() or not manifest.checksum:
        return None
    key = key_of(manifest, provider)
    path = _path(folder, key)
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        plan = msgspec.json.decode(path.read_bytes(), type=RuntimePlan)
        if plan.schema != SCHEMA or plan.key != key or not 1 <= plan.threads <= _MOST_THREADS:
            raise ValueError("it is not for this bundle on this machine")
    except (OSError, ValueError, RecursionError) as error:
        LOG.warning("the plan %s is ignored: %s", path, error)
        return None
    return plan


def write_plan(plan: RuntimePlan) -> Path:
    """Write a plan for `find_plan` and return its file.

    Raises:
        EdgemixError: It cannot be written.
    """
    folder = _plans()
    if folder is None:
        raise EdgemixError("there is no folder for plans", f"Set the environment variable {CACHE} to one.")
    with storage_errors(f"writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, plan.key)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")
    return path


def _plans() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "plans"


def _path(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
