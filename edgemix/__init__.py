"""edgemix: several language models, one small mixture that runs anywhere."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemix.bundle import Manifest as Manifest
    from edgemix.errors import EdgemixError as EdgemixError
    from edgemix.recipe import Recipe as Recipe
    from edgemix.runtime import Completion as Completion
    from edgemix.runtime import Mixture as Mixture
    from edgemix.runtime import Score as Score

__version__ = "0.1.0"

_HOMES = {
    "Completion": "edgemix.runtime",
    "EdgemixError": "edgemix.errors",
    "Manifest": "edgemix.bundle",
    "Mixture": "edgemix.runtime",
    "Recipe": "edgemix.recipe",
    "Score": "edgemix.runtime",
}
__all__ = ["Completion", "EdgemixError", "Manifest", "Mixture", "Recipe", "Score", "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import edgemix` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
