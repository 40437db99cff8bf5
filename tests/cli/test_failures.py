"""Every failure ends in a message, a remedy and an exit code; never in a traceback."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import edgemix.cli.commands.bundle
from edgemix.cli.command import command
from edgemix.cli.failures import DEBUG
from edgemix.errors import BundleError, EdgemixError


@pytest.fixture
def run_raising(monkeypatch):
    """Run `edgemix inspect BUNDLE` with a body that raises."""

    def run(error: BaseException, *arguments: str, extra: str = ""):
        @command("inspect", example="edgemix inspect b", extra=extra, on_interrupt="The old one is kept.")
        @click.argument("bundle")
        def failing(console, bundle):
            raise error

        monkeypatch.setattr(edgemix.cli.commands.bundle, "inspect", failing)
        return CliRunner().invoke(edgemix.cli.edgemix, ["inspect", "b", *arguments])

    return run


CASES = [
    (EdgemixError("it failed", "do this"), 1, "error: it failed\ndo this\n"),
    (BundleError("bad bundle"), 2, "error: bad bundle\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\nThe old one is kept.\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: /x/y: No space left on device\n"),
    (MemoryError(), 1, "error: out of memory\n"),
    (
        ZeroDivisionError("by zero"),
        1,
        "error: unexpected ZeroDivisionError: by zero\nThis is a bug in edgemix; run with",
    ),
    (OSError("hub cannot be reached"), 1, "error: unexpected OSError: hub cannot be reached"),
]


@pytest.mark.parametrize(("error", "code", "message"), CASES, ids=lambda value: type(value).__name__)
def test_message_and_exit_code(run_raising, error, code, message):
    result = run_raising(error)

    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("error", "code", "message"), CASES, ids=lambda value: type(value).__name__)
def test_json_error_object(run_raising, error, code, message):
    result = run_raising(error, "--json")

    output = json.loads(result.stdout)["error"]
    assert result.exit_code == output["code"] == code
    assert output["message"] in message
    assert result.stderr.startswith(message)


def test_a_missing_optional_package_names_its_extra(run_raising):
    result = run_raising(ModuleNotFoundError("No module named 'torch'", name="torch"), extra="export,cpu")

    assert result.exit_code == 1
    assert result.stderr == (
        "error: edgemix inspect needs the package torch, which is not installed\npip install 'edgemix[export,cpu]'\n"
    )


def test_a_missing_module_of_edgemix_is_a_bug(run_raising):
    result = run_raising(ModuleNotFoundError("No module named 'edgemix.x'", name="edgemix.x"), extra="export")

    assert result.exit_code == 1
    assert "This is a bug" in result.stderr


def test_debug_prints_the_traceback(run_raising, monkeypatch):
    monkeypatch.setenv(DEBUG, "1")

    result = run_raising(ZeroDivisionError("by zero"))

    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr


def test_ctrl_c_that_python_drops_is_delivered_again():
    """Ctrl-C while a library's finalizer ran was printed as a traceback, and the command went on."""
    code = (
        "import edgemix.cli, edgemix.cli.commands.doctor, time\n"
        "class Finalised:\n"
        "    def __del__(self): raise KeyboardInterrupt\n"
        "def work(**options):\n"
        "    Finalised()\n"
        "    for _ in range(1000): time.sleep(0.02)\n"
        "edgemix.cli.commands.doctor.doctor.callback = work\n"
        "edgemix.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)

    assert result.returncode == 130
    assert result.stderr.strip() == "interrupted"


def test_a_closed_pipe_prints_no_error(run_raising):
    result = run_raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))

    assert result.exit_code == 1
    assert result.output == ""
