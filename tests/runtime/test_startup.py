"""Programs start fast with the runtime."""

import os
import subprocess
import sys

from helpers.onnx_members import VOCABULARY, random_member, write_bundle

PROGRAM = "import time; start = time.process_time(); import edgemix.runtime; print(time.process_time() - start)"


def test_importing_the_runtime_takes_less_than_half_a_second():
    seconds = (subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True) for _ in range(5))
    assert min(float(run.stdout) for run in seconds) < 0.5


def test_logs_are_shown_only_where_an_app_wants_them():
    """Python prints warnings of a library that says nothing about its logs."""
    code = "import logging, edgemix; logging.getLogger('edgemix.runtime.graphs.providers').warning('hm')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")


def test_onnx_runtime_writes_nothing_into_the_users_folders(tmp_path):
    """It kept a database of its calls in the user's cache, which it uploads."""
    bundle = write_bundle(tmp_path / "bundle", {"one": random_member(0, tokens=VOCABULARY)})
    code = "import edgemix, sys; print(edgemix.load(sys.argv[1], provider='cpu').generate('a', max_new_tokens=2).text)"
    home = tmp_path / "home"
    home.mkdir()
    folders = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TMPDIR")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | folders
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, env=environment, capture_output=True)
    assert [*home.rglob("*")] == []
