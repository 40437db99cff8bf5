"""What tests of several parts share."""

from __future__ import annotations

import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.cut_students import cut_student
from helpers.onnx_members import EOS, saying, write_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

MATH, CODE = "1+2=3", "def x"
"""What the two members of `bundle` say after each character of it."""

TIERS = {
    "export": (
        *("export", "cli/commands/test_prune.py", "runtime/classification/test_against_transformers.py"),
        *("test_end_to_end.py", "test_fuzz.py", "test_tools.py"),
    ),
    "browser": ("report/test_browser.py",),
    "gpu": ("test_gpu.py",),
}
"""The tests of each tier, by path; all others are `unit` tests, which need no torch."""

collect_ignore = [] if find_spec("torch") else [*TIERS["export"], *TIERS["gpu"]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        tiers = (name for name, places in TIERS.items() if any(path.is_relative_to(place) for place in places))
        item.add_marker(next(tiers, "unit"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two tiny members with known outputs; not to be changed."""
    return write_bundle(
        tmp_path_factory.mktemp("bundle") / "mixture",
        {"math": saying(MATH), "code": saying(CODE)},
        weights={"math": 0.75, "code": 0.25},
        domains={"numbers": {"math": 1.0, "code": 0.0}, "programs": {"math": 0.0, "code": 1.0}},
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )


@pytest.fixture(scope="session")
def student_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same members with a student, who knows half of what "math" says and drafts some tokens only; not
    to be changed.
    """
    folder = write_bundle(
        tmp_path_factory.mktemp("bundle") / "mixture",
        {"math": saying(MATH), "code": saying(CODE)},
        weights={"math": 0.75, "code": 0.25},
        student=saying(MATH[:3]),
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )
    return cut_student(folder, sorted({*f"{MATH}{CODE}".encode(), EOS}))


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of `bundle` that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "mixture"))


@pytest.fixture(scope="session", autouse=True)
def _no_plans_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was recommended on this machine does not change what tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure() -> None:
    """Give each of several test processes a core to itself: else the threads of all would wait for each other.

    A background job of a shell starts with Ctrl-C ignored, and so would every test of it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
