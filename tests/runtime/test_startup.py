"""Programs start fast with the runtime."""

import subprocess
import sys

PROGRAM = "import time; start = time.process_time(); import edgemix.runtime; print(time.process_time() - start)"


def test_importing_the_runtime_takes_less_than_half_a_second():
    seconds = (subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True) for _ in range(5))
    assert min(float(run.stdout) for run in seconds) < 0.5


def test_logs_are_shown_only_where_an_app_wants_them():
    """Python prints warnings of a library that says nothing about its logs."""
    code = "import logging, edgemix; logging.getLogger('edgemix.runtime.graphs.providers').warning('hm')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")
