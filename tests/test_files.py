"""Lock files: one process at a time, never stale, deletable by their holder; temporary files of killed processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgemix.errors import InputError
from edgemix.files import acquire_lock, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from edgemix.files import acquire_lock
lock = acquire_lock(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_lock_is_held_once_and_released(tmp_path: Path) -> None:
    path = tmp_path / "folder/lock"
    lock = acquire_lock(path)
    with pytest.raises(InputError, match=r"another run.*is locked"):
        acquire_lock(path)
    acquire_lock(tmp_path / "folder/other").release()
    lock.release()
    acquire_lock(path).release()


def test_a_killed_process_leaves_no_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="another run"):
            acquire_lock(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    acquire_lock(path).release()


def test_the_holder_may_delete_the_locks_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder/lock"
    first = acquire_lock(path)
    shutil.rmtree(path.parent)
    second = acquire_lock(path)  # another run begins before the first one releases
    first.release()
    with pytest.raises(InputError, match="another run"):
        acquire_lock(path)
    second.release()
    assert path.exists()


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """And those of processes that run, or of files of other names, are not."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    killed, alive = int(ended.stdout), os.getppid()
    names = [f".a[1].{killed}.tmp", f".a[1].{alive}.tmp", f".b.{killed}.tmp", ".a[1].x.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f".a[1].{killed}0.tmp").write_text("new")  # perhaps of another machine
    write_atomically(tmp_path / "a[1]", b"whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a[1]", *names[1:], f".a[1].{killed}0.tmp"}
