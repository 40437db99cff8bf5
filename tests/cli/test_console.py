"""The console's output, and the progress of long work."""

from __future__ import annotations

import io
import json

import click
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console as RichConsole

from edgemix.cli.command import command
from edgemix.cli.console import Console, printable
from edgemix.cli.progress import BarProgress, LineProgress


def test_with_json_stdout_holds_one_document_whatever_libraries_print():
    @command("noisy", example="edgemix noisy")
    def noisy(console):
        print("a library prints")
        console.line("for people")
        console.table("Title", ("a",), [("b",)])
        console.document({"array": np.arange(2), "nan": float("nan")})

    result = CliRunner().invoke(noisy, ["--json"])

    assert json.loads(result.stdout) == {"array": [0, 1], "nan": None}
    assert result.stderr == "a library prints\n"


def test_figures_are_aligned_right(capsys):
    Console().table("Title", ("Name", "MB"), [("a", "1.0"), ("b", "100.0")])

    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Title",
        "Name      MB",
        "────────────",
        "a        1.0",
        "b      100.0",
        "",
    ]


def test_control_characters_do_not_reach_the_terminal(capsys):
    Console().table("\x1b[2Jtitle", ("a",), [("\x1b]0;cell\x07",)])
    Console().line("\x1b[2Jline")

    assert "\x1b" not in capsys.readouterr().out
    assert printable("tab\t, line\r\n") == "tab\t, line\r\n"


def test_a_long_stage_prints_its_share_of_work_done(capsys, monkeypatch):
    """Regression: in a log, distillation printed nothing for 45 minutes."""
    now = 0.0
    monkeypatch.setattr("edgemix.cli.progress.time.monotonic", lambda: now)
    with LineProgress().stage("distill", 200) as task:
        for step in range(200):
            now += 1
            task.advance(note=f"step {step + 1}")
    with LineProgress().stage("teacher") as task:
        now += 61
        task.advance()

    assert capsys.readouterr().err.splitlines() == [
        "distill: 30% (step 60)",
        "distill: 60% (step 120)",
        "distill: 90% (step 180)",
        "distill: 200.0 s (step 200)",
        "teacher: under way",
        "teacher: 61.0 s",
    ]


def test_plain_lines_at_the_end_of_stages(capsys):
    progress = LineProgress()
    with progress.stage("outer", 2) as outer:
        with progress.stage("inner") as inner:
            inner.advance(3, "loss 1.0")
            inner.advance()
        outer.advance()
        progress.log("something [to] say")

    lines = capsys.readouterr().err.splitlines()
    assert lines == ["inner: 0.0 s (loss 1.0)", "something [to] say", "outer: 0.0 s"]


def test_bars_leave_the_same_lines_and_nothing_else():
    shown = io.StringIO()
    progress = BarProgress(RichConsole(file=shown, force_terminal=True, width=80))
    with progress.stage("outer", 2), progress.stage("inner [red]") as inner:
        inner.advance(3, "[loss]")
        progress.log("something [to] say")

    text = click.unstyle(shown.getvalue())
    assert "something [to] say" in text
    assert "inner [red]: 0.0 s ([loss])" in text
    assert "outer: 0.0 s" in text


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_a_stage_that_fails_is_not_reported_as_done(kind, capsys):
    shown = io.StringIO()
    progress = (
        LineProgress() if kind == "lines" else BarProgress(RichConsole(file=shown, force_terminal=True, width=80))
    )

    with pytest.raises(ValueError, match="broken"), progress.stage("failing"):
        raise ValueError("broken")

    assert "failing: " not in shown.getvalue() + capsys.readouterr().err
