"""The group: help, version, start-up, the options that all commands have."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import edgemix
from edgemix.cli import COMMANDS
from edgemix.cli import edgemix as group


def run(*arguments: str):
    return CliRunner().invoke(group, list(arguments))


def test_version():
    result = run("--version")

    assert (result.exit_code, result.output) == (0, f"edgemix {edgemix.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments):
    result = run(*arguments)

    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_an_example(name):
    result = run(name, "--help")

    assert result.exit_code == 0
    assert "--json" in result.output
    assert f"Example:\n    edgemix {name}" in result.output or f"\n    edgemix {name} " in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_a_usage_error(name):
    result = run(name, "--nonsense", "--json")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: No such option")
    assert f"Help: edgemix {name} --help" in result.stderr
    assert json.loads(result.stdout)["error"]["code"] == 2


def test_an_unknown_command_is_a_usage_error():
    result = run("exprot")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: No such command 'exprot'")


def test_start_up_imports_nothing_heavy():
    """`edgemix --help` must answer at once, which importing numpy or rich alone would prevent."""
    code = (
        "import sys; from edgemix.cli import edgemix\n"
        "try: edgemix(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'torch', 'transformers', 'onnxruntime', 'tokenizers', 'psutil', 'yaml', 'msgspec'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stderr == "[]\n"


def test_python_m_edgemix():
    result = subprocess.run([sys.executable, "-m", "edgemix", "--version"], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (0, f"edgemix {edgemix.__version__}\n")


def test_every_command_has_the_name_it_is_listed_by(monkeypatch):
    context = click.Context(group)

    assert all(group.get_command(context, name).name == name for name in COMMANDS)
