"""llguidance, the optional package that computes which tokens a grammar allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemix.errors import EdgemixError, library_errors

if TYPE_CHECKING:
    from collections.abc import Sequence


def llguidance_module() -> Any:
    """Import llguidance when it is first needed.

    Raises:
        EdgemixError: It is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise EdgemixError(
            "json_schema, regex and choices need llguidance, which is not installed",
            "pip install 'edgemix[constrained]'",
        ) from None
    return llguidance


def vocabulary_of(core: Any, vocabulary: int, eos: Sequence[int]) -> Any:
    """Return a tokenizer's vocabulary for llguidance; takes about 0.2 s for 49,000 tokens.

    Args:
        core: A `tokenizers.Tokenizer`.
        vocabulary: Number of token ids.
        eos: End-of-text tokens.

    Raises:
        EdgemixError: llguidance is not installed, or cannot read the tokenizer.
    """
    module = llguidance_module()
    with library_errors("llguidance cannot read this tokenizer"):
        return module.LLTokenizer(core.to_str(), n_vocab=vocabulary, eos_token=list(eos))
