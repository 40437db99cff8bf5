"""The checks of `tools/check_gpu.py`, on a machine with a CUDA GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgemix.errors import EdgemixError
from edgemix.runtime.graphs.providers import choose


def test_a_gpu_computes_what_the_cpu_does(tmp_path):
    try:
        choose("cuda")
    except EdgemixError as error:
        pytest.skip(error.message)
    tool = Path(__file__).parents[1] / "tools" / "check_gpu.py"

    result = subprocess.run(
        [sys.executable, str(tool), "--folder", str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr
