"""Fixtures of the commands that call the exporter."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def library(monkeypatch):
    """Replace a function of the library by one that returns or raises `answer`; returns the list of its calls."""
    calls: list[tuple[tuple, dict]] = []

    def replace(module: str, name: str, answer: object) -> list[tuple[tuple, dict]]:
        def function(*arguments, **options):
            calls.append((arguments, options))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))
        return calls

    return replace


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("members:\n  - name: a\n    model: hub/id\n")
    return path
