"""Let atheris choose the mutations by coverage (pip install atheris)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ByteRandom(Random):
    """A random generator whose numbers are bytes that a fuzzer chose, and zeros after them."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0
        super().__init__(0)

    def getrandbits(self, k: int, /) -> int:
        size = (k + 7) // 8
        chosen = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(chosen.ljust(size, b"\0"), "little") & (1 << k) - 1

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def main(arguments: Sequence[str]) -> None:
    """Fuzz until a case fails."""
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed: pip install atheris") from None
    with atheris.instrument_imports(include=["edgemix"]):
        from cases import Bases
        from worker import run
    folder = Path(tempfile.mkdtemp(prefix="edgemix-fuzz-"))
    bases = Bases(folder / "bases")

    def one(data: bytes) -> None:
        outcome = run(ByteRandom(data), bases, folder / "case")
        if outcome["kind"] != "clean":
            raise RuntimeError(f"{outcome['part']}: {outcome['kind']}: {outcome['detail']}")

    atheris.Setup([sys.argv[0], f"-timeout={20}", *arguments], one)
    atheris.Fuzz()
