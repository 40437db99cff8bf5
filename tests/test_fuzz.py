"""A fixed corpus of hostile bundles, made by `tools/fuzz`: each is refused with an EdgemixError, or answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

CASES = 240
TOOL = Path(__file__).parents[1] / "tools/fuzz/__main__.py"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tool as a module; its own modules are forgotten afterwards, as their names are short."""
    monkeypatch.syspath_prepend(TOOL.parent)
    before = set(sys.modules)
    specification = importlib.util.spec_from_file_location("fuzz_tool", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == TOOL.parent:
            del sys.modules[name]


def failed(outcomes: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [outcome for outcome in outcomes if outcome["kind"] != "clean"]


def test_hostile_bundles_are_refused_or_answer(fuzz: ModuleType, tmp_path: Path) -> None:
    """163 of 10,517 such bundles once ended in a traceback, an abort, a hang, or in more than 2 GiB of memory."""
    assert failed(fuzz.outcomes(range(CASES), 1, tmp_path)) == []


def test_half_of_the_cases_are_in_the_tokenizer_and_the_template(fuzz: ModuleType) -> None:
    parts = [fuzz.part_of(seed) for seed in range(500)]
    assert parts.count("tokenizer") > 100
    assert parts.count("template") > 90


def test_a_worker_that_dies_is_replaced(fuzz: ModuleType, tmp_path: Path) -> None:
    from cases import Bases

    Bases(tmp_path / "bases")
    worker = fuzz.Worker(tmp_path / "case", tmp_path / "bases")
    try:
        assert worker.run("no number")["kind"] == "abort"
        assert worker.run(1)["kind"] == "clean"
    finally:
        worker.stop()
