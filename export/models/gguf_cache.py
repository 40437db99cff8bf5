"""Parse a GGUF file once while its configuration, weights and tokenizer are loaded.

transformers opens a `gguf.GGUFReader` for each of the three, which takes seconds per 50,000 tokens of vocabulary, and
builds the same table of tensor names anew for every module of the model. Both are imported when they are used, so that
memoized versions can stand in for them.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Memoize `gguf`'s readers and tables of tensor names within the block; files must not change meanwhile."""
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
