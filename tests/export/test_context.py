"""The stages of an export: run once, stored, and run again when their inputs or files change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgemix.bundle.writer import BundleWriter
from edgemix.export.context import ExportContext
from edgemix.recipe.schema import MemberRecipe, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def context(tmp_path: Path) -> Iterator[ExportContext]:
    with BundleWriter(tmp_path / "bundle") as writer:
        yield ExportContext(Recipe(members=(MemberRecipe("one", "one"),)), writer)


def test_a_stage_runs_once_for_the_same_key(context: ExportContext) -> None:
    runs: list[int] = []

    def make() -> list[int]:
        runs.append(len(runs))
        return [7, 8]

    cleanups: list[int] = []
    for key in ("a", "a", "b"):
        assert context.stage("name", key, make, list[int], cleanup=lambda: cleanups.append(1)) == [7, 8]
    assert runs == [0, 1]
    assert len(cleanups) == 2, "once for each run"


def test_a_stage_runs_again_when_its_file_has_changed(context: ExportContext) -> None:
    path = context.writer.scratch / "file"
    runs: list[int] = []

    def make() -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("made")
        runs.append(1)
        return True

    for _ in range(2):
        context.stage("name", "key", make, bool, files=[path, context.writer.scratch / "not written"])
    path.write_text("another text")
    context.stage("name", "key", make, bool, files=[path])
    assert len(runs) == 2
    assert path.read_text() == "made"


def test_a_stage_that_fails_is_not_stored(context: ExportContext) -> None:
    def fail() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        context.stage("name", "key", fail, int)
    assert context.stage("name", "key", lambda: 3, int) == 3
