"""`chat`: in a terminal, and from a pipe."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix
from edgemix.cli.commands.chat import Conversation
from edgemix.cli.console import Console
from edgemix.runtime import Mixture


def test_every_line_of_a_pipe_is_a_message(bundle):
    result = CliRunner().invoke(edgemix, ["chat", str(bundle), "--weights", "code=1"], input="d\n\ne\n")

    assert (result.exit_code, result.stdout) == (0, "ef x\nf x\n")


def test_an_empty_answer_is_not_part_of_the_conversation(bundle):
    arguments = ["chat", str(bundle), "--weights", "code=1", "--json"]
    result = CliRunner().invoke(edgemix, arguments, input="x\nd\n")

    assert [message["content"] for message in json.loads(result.stdout)["messages"]] == ["d", "ef x"]


def test_json_is_the_conversation(bundle):
    arguments = ["chat", str(bundle), "--weights", "code=1", "--system", "Speak.", "--json"]
    result = CliRunner().invoke(edgemix, arguments, input="d\n")

    assert json.loads(result.stdout) == {
        "provider": "cpu",
        "student": False,
        "weights": {"code": 1.0},
        "messages": [
            {"role": "system", "content": "Speak."},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "ef x"},
        ],
    }


def test_the_student_alone(student_bundle, bundle):
    result = CliRunner().invoke(edgemix, ["chat", str(student_bundle), "--student"], input="1\n")
    assert (result.exit_code, result.stdout) == (0, "+2\n")

    for arguments, message in (
        ([str(bundle), "--student"], "has no student"),
        ([str(student_bundle), "--student", "--weights", "code=1"], "--student leaves them out"),
    ):
        result = CliRunner().invoke(edgemix, ["chat", *arguments], input="1\n")
        assert result.exit_code == 2
        assert message in result.stderr


def test_stdin_that_is_not_utf8(bundle):
    result = CliRunner().invoke(edgemix, ["chat", str(bundle)], input=b"a\xff\n")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: stdin is not UTF-8")


def test_a_bundle_without_a_chat_template(bundle, tmp_path):
    from helpers.onnx_members import saying, write_bundle

    plain = write_bundle(tmp_path / "plain", {"one": saying("ab")})
    result = CliRunner().invoke(edgemix, ["chat", str(plain)], input="a\n")

    assert result.exit_code == 2
    assert "chat template" in result.stderr


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(bundle, monkeypatch):
    class Interrupted(Console):
        def write(self, text):
            super().write(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with Mixture.load(bundle, provider="cpu") as mixture:
        conversation = Conversation(Interrupted(), mixture, "Speak.", {"weights": {"code": 1.0}})
        conversation.answer("d")

        assert conversation.session.messages == [
            {"role": "system", "content": "Speak."},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e"},
        ]


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_in_a_terminal(bundle):
    """Ctrl-C at the prompt does not leave, /reset and /nonsense are answered, Ctrl-D leaves with exit code 0."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgemix", "chat", str(bundle), "--weights", "code=1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        _wait_for(ours, "> ")
        os.write(ours, b"d\n")
        _wait_for(ours, "ef x", "> ")
        # Between readline's prompt and its wait for keys, a signal is only seen with the next one.
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            if _comes(ours, 2, "Ctrl-D leaves.", "> "):
                break
        os.write(ours, b"/reset\n")
        _wait_for(ours, "The conversation is cleared.", "> ")
        os.write(ours, b"/nonsense\n")
        _wait_for(ours, "/reset clears", "> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _wait_for(terminal: int, *texts: str) -> None:
    assert _comes(terminal, 30, *texts), texts


def _comes(terminal: int, seconds: float, *texts: str) -> bool:
    """Read a terminal until all `texts` have come, in that order; False if nothing comes for `seconds` seconds."""
    seen = ""
    while not re.search(".*".join(map(re.escape, texts)), seen, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], seconds)
        if not ready:
            return False
        seen += os.read(terminal, 4096).decode(errors="replace")
    return True
