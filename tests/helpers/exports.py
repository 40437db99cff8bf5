"""Exports of tiny members: their text, their graphs' digests, and a spy on the stages."""

from __future__ import annotations

import hashlib

from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource
from helpers.gguf_files import write

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 40


class Spy:
    """Calls a function of a module and records the arguments."""

    def __init__(self, monkeypatch, name, module):
        self.calls, self._real = [], getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments, **options):
        self.calls.append(arguments)
        return self._real(*arguments, **options)


def graphs(bundle):
    return {
        path.relative_to(bundle): hashlib.sha256(path.read_bytes()).digest() for path in bundle.rglob("model.onnx*")
    }


def gguf_recipe(folder, kinds, otherwise, **changes):
    write(folder, kinds, otherwise, vocab_size=320)
    (folder / "text.txt").write_text(TEXT)
    data = Data(calibration={"prose": TextSource("text.txt")})
    options = {"members": (MemberRecipe("m", "tiny.gguf"),), "data": data, "format": "int4", "folder": folder}
    return Recipe(**(options | changes))
