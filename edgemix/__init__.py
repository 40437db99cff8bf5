"""edgemix: several models, one small mixture that runs anywhere."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest as Manifest
    from edgemix.errors import EdgemixError as EdgemixError
    from edgemix.recipe.schema import Recipe as Recipe
    from edgemix.runtime import BatchScheduler as BatchScheduler
    from edgemix.runtime import Chunk as Chunk
    from edgemix.runtime import Completion as Completion
    from edgemix.runtime import GenerateOptions as GenerateOptions
    from edgemix.runtime import Mixture as Mixture
    from edgemix.runtime import RequestHandle as RequestHandle
    from edgemix.runtime import Score as Score
    from edgemix.runtime import Session as Session

__version__ = "0.1.0"

# ONNX Runtime reads this when it is imported. Without it, it keeps a database of calls in the user's cache, and uploads
# that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

logging.getLogger(__name__).addHandler(logging.NullHandler())  # an app decides what of it is shown

_HOMES = {
    "BatchScheduler": "edgemix.runtime",
    "Chunk": "edgemix.runtime",
    "Completion": "edgemix.runtime",
    "EdgemixError": "edgemix.errors",
    "Manifest": "edgemix.bundle.manifest",
    "GenerateOptions": "edgemix.runtime",
    "Mixture": "edgemix.runtime",
    "Recipe": "edgemix.recipe.schema",
    "Score": "edgemix.runtime",
    "Session": "edgemix.runtime",
    "RequestHandle": "edgemix.runtime",
}
_OLD_NAMES = {"Server": "BatchScheduler", "Ticket": "RequestHandle"}
__all__ = [
    "BatchScheduler",
    "Chunk",
    "Completion",
    "EdgemixError",
    "GenerateOptions",
    "Manifest",
    "Mixture",
    "Recipe",
    "RequestHandle",
    "Score",
    "Session",
    "__version__",
    "load",
]


def load(path: str | Path, **options: Any) -> Any:
    """Open a bundle of any task.

    Args:
        path: The bundle's folder.
        options: Those of the task's class; for text generation, of `Mixture.load`.

    Returns:
        The object that runs the bundle's task: a `Mixture` for text-generation, a `Classifier` for text-classification,
        a `TokenClassifier` for token-classification, a `FillMask` for fill-mask.

    Raises:
        BundleError: There is no bundle, it is from a newer edgemix, or it is damaged.
    """
    from pathlib import Path

    from edgemix.bundle.reader import read_any_manifest
    from edgemix.tasks import TASKS

    return TASKS[read_any_manifest(Path(path)).task].load("runtime_class").load(path, **options)


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import edgemix` costs nothing."""
    name = _OLD_NAMES.get(name, name)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
