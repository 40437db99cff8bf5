"""Parse a GGUF file once while its configuration, weights and tokenizer are loaded.

transformers opens a `gguf.GGUFReader` for each of the three, which takes seconds per 50,000 tokens of vocabulary, and
builds the same table of tensor names anew for every module of the model. Both are imported when they are used, so that
memoized versions can stand in for them. The reader cuts its file into hundreds of thousands of slices, and spends most
of its time on `numpy.memmap`'s bookkeeping of them; a plain view of the same memory has none.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Memoize `gguf`'s readers and tables of tensor names within the block; files must not change meanwhile."""
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainReader(reader):  # type: ignore[misc, valid-type]
        """A reader whose `data` is a plain view of its memory-mapped file."""

        @property
        def data(self) -> NDArray[Any]:
            return self._data

        @data.setter
        def data(self, mapped: NDArray[Any]) -> None:
            self._data = np.asarray(mapped)

    gguf.GGUFReader, gguf.get_tensor_name_map = cache(PlainReader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
