"""A bundle's mixture and its student, opened for a command that looks at both."""

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
    """Both, the student where there is one.

    Raises:
        BundleError, EdgemixError: As `Mixture.load`.
    """
    from edgemix.runtime import Mixture

    with ExitStack() as stack:
        mixture = stack.enter_context(Mixture.load(bundle, provider, threads, verify))
        student = None
        if mixture.manifest.student is not None:  # verified with the rest of the bundle
            student = stack.enter_context(Mixture.load(bundle, provider, threads, verify=False, student=True))
        yield mixture, student
