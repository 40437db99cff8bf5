"""Reading prompts and files."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix
from edgemix.cli.texts import read_files
from edgemix.errors import InputError


def generate(*arguments: str, stdin: bytes = b""):
    return CliRunner().invoke(edgemix, ["generate", "no-such-bundle", *arguments], input=stdin)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([""], b"", "error: the prompt is empty"),
        ([], b"", "error: stdin is empty"),
        ([], b"\n", "error: stdin is empty"),
        (["-"], b"", "error: stdin is empty"),
        ([], b"abc\xff", "error: stdin is not UTF-8: byte 0xff at offset 3"),
        (["--file", "missing.txt"], b"", "error: missing.txt: no such file"),
        (["hello", "--file", "missing.txt"], b"", "error: Give the prompt as an argument or with --file, not both."),
    ],
)
def test_invalid_prompts(arguments, stdin, message):
    result = generate(*arguments, stdin=stdin)

    assert result.exit_code == 2
    assert result.stderr.startswith(message)


def test_a_valid_prompt_is_accepted():
    result = generate(stdin="Grüße\n".encode())

    assert result.exit_code == 2
    assert result.stderr.startswith("error: no-such-bundle: there is no such bundle")


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "image.txt").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_bytes(b"")

    assert "is not UTF-8: byte 0x89 at offset 0" in generate("--file", str(tmp_path / "image.txt")).stderr
    assert "has no text" in generate("--file", str(tmp_path / "empty.txt")).stderr
    assert "is a folder" in generate("--file", str(tmp_path)).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
def test_an_argument_that_is_not_utf8():
    command = [sys.executable, "-m", "edgemix", "generate", "no-such-bundle", b"abc\xff"]
    result = subprocess.run(command, capture_output=True, check=False)

    assert result.returncode == 2
    assert result.stderr.startswith(b"error: the prompt is not UTF-8")
    assert b"Traceback" not in result.stderr


def test_files_are_named_by_their_stem_or_by_their_path(tmp_path):
    paths = [tmp_path / name for name in ("a/test.txt", "b/test.txt", "other.jsonl")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    paths[0].write_text("one")
    paths[1].write_text("two")
    paths[2].write_text('{"q": "three"}\n{"q": "four"}\n')

    assert read_files(tuple(paths), "Q: {q}") == {
        str(paths[0]): ["one"],
        str(paths[1]): ["two"],
        "other": ["Q: three", "Q: four"],
    }


def test_a_template_without_a_file_for_it(tmp_path):
    (tmp_path / "a.txt").write_text("one")

    with pytest.raises(click.UsageError, match="--template is for"):
        read_files((tmp_path / "a.txt",), "{q}")


def test_a_file_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("one")

    with pytest.raises(click.UsageError, match="given twice"):
        read_files((tmp_path / "a.txt",) * 2, None)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_files((tmp_path / "a.txt",), None)
