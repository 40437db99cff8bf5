"""edgemix: several language models, one small mixture that runs anywhere."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemix.bundle.manifest import Manifest as Manifest
    from edgemix.errors import EdgemixError as EdgemixError
    from edgemix.recipe.schema import Recipe as Recipe
    from edgemix.runtime import Chunk as Chunk
    from edgemix.runtime import Completion as Completion
    from edgemix.runtime import GenerateOptions as GenerateOptions
    from edgemix.runtime import Mixture as Mixture
    from edgemix.runtime import Score as Score
    from edgemix.runtime import Server as Server
    from edgemix.runtime import Session as Session
    from edgemix.runtime import Ticket as Ticket

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # an app decides what of it is shown

_HOMES = {
    "Chunk": "edgemix.runtime",
    "Completion": "edgemix.runtime",
    "EdgemixError": "edgemix.errors",
    "Manifest": "edgemix.bundle.manifest",
    "GenerateOptions": "edgemix.runtime",
    "Mixture": "edgemix.runtime",
    "Recipe": "edgemix.recipe.schema",
    "Score": "edgemix.runtime",
    "Server": "edgemix.runtime",
    "Session": "edgemix.runtime",
    "Ticket": "edgemix.runtime",
}
__all__ = [
    "Chunk",
    "Completion",
    "EdgemixError",
    "GenerateOptions",
    "Manifest",
    "Mixture",
    "Recipe",
    "Score",
    "Server",
    "Session",
    "Ticket",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import edgemix` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
