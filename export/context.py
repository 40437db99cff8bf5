"""The context that all stages of an export share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from edgemix.progress import NO_PROGRESS, PrefixedProgress, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edgemix.bundle.writer import BundleWriter
    from edgemix.recipe.schema import MemberRecipe, Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class ExportContext:
    """One export: what to build, where to, and where its progress is shown.

    Attributes:
        recipe: A checked recipe.
        writer: The writer of the bundle; its scratch holds what the stages keep.
        force: Whether graphs that are over their parity limits are accepted.
        progress: Progress callback.
        strict: Whether warnings of libraries are errors; then only stages of strict exports are reused, as these warned
            about nothing.
    """

    recipe: Recipe
    writer: BundleWriter
    force: bool = False
    progress: Progress = NO_PROGRESS
    strict: bool = False

    def member_progress(self, spec: MemberRecipe) -> Progress:
        """Return the progress callback for the stages of one member."""
        return PrefixedProgress(self.progress, spec.name)

    def stage(
        self,
        name: str,
        key: str,
        make: Callable[[], T],
        kind: type[T],
        *,
        files: Iterable[Path] = (),
        cleanup: Callable[[], None] | None = None,
    ) -> T:
        """Return a stage's result: the stored one if its inputs are the same, else that of `make`, which is stored.

        Args:
            name: The stage, as a relative path ("blocks/math").
            key: Digest of its inputs, from `stage_key`.
            make: Runs the stage.
            kind: Type of the result; msgspec writes and reads it as JSON.
            files: The files and folders under the writer's `folder` or `scratch` that the stage may write.
            cleanup: Called after a stage that had to run is stored.
        """
        key += "-strict" if self.strict else ""
        return run_stage(self.writer, name, key, make, kind, files=files, cleanup=cleanup)


def run_stage(
    writer: BundleWriter,
    name: str,
    key: str,
    make: Callable[[], T],
    kind: Any,
    *,
    files: Iterable[Path] = (),
    cleanup: Callable[[], None] | None = None,
) -> T:
    """Return a stage's result: the stored one if its inputs are the same, else that of `make`; see `ExportContext`."""
    result: T | None = writer.stages.done(name, key, kind)
    if result is None:
        result = make()
        writer.stages.mark_done(name, key, result, files=[path for path in files if path.exists()])
        if cleanup is not None:
            cleanup()
    return result
