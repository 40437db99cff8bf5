"""Programs start fast with the runtime."""

import subprocess
import sys

PROGRAM = "import time; start = time.process_time(); import edgemix.runtime; print(time.process_time() - start)"


def test_importing_the_runtime_takes_less_than_half_a_second():
    seconds = (subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True) for _ in range(5))
    assert min(float(run.stdout) for run in seconds) < 0.5
