"""Save a model with its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from edgemix.errors import storage_errors

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_member(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, *, license_id: str | None = None
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, in one step; a model card states the license.

    Raises:
        EdgemixError: The folder cannot be written.
    """
    staging = output.with_name(f".{output.name}.partial")
    with storage_errors(f"writing {output}"):
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if license_id:
            (staging / "README.md").write_text(f"---\nlicense: {license_id}\n---\n", "utf-8")
        staging.rename(output)
