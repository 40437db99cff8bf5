"""Read LoRA adapters, add them to models and merge them."""

from edgemix.export.models.adapters.attaching import add_adapter
from edgemix.export.models.adapters.merging import merge_adapter

__all__ = ["add_adapter", "merge_adapter"]
