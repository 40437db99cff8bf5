"""Load a bundle's mixture and its student, for commands that use both."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemix.runtime import Mixture


@contextmanager
def mixture_and_student(
    bundle: Path, provider: str, threads: int | None, verify: bool
) -> Iterator[tuple[Mixture, Mixture | None]]:
    """Load the mixture and the student; the student is None if the bundle has none.

    Raises:
        BundleError, EdgemixError: The same as `Mixture.load`.
    """
    from edgemix.runtime import Mixture

    with ExitStack() as stack:
        mixture = stack.enter_context(Mixture.load(bundle, provider, threads, verify))
        student = None
        if mixture.manifest.student is not None:  # its checksums are part of the bundle's
            student = stack.enter_context(Mixture.load(bundle, provider, threads, verify=False, student=True))
        yield mixture, student
