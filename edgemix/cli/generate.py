"""`edgemix generate`: continue a text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, check_student, mixing_options, runtime_options, sampling_options
from edgemix.cli.texts import read_prompt

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.runtime import Completion


@command(
    "generate",
    example='edgemix generate mixture "The prime numbers are" -n 64\n'
    "edgemix generate mixture --file story.txt --temperature 0.8 --seed 1\n"
    'echo "def area(radius):" | edgemix generate mixture --weights code=1\n'
    'edgemix generate mixture "Once upon a time" --student',
    extra="cpu",
    kept="The text so far is all there is.",
)
@bundle_argument
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@sampling_options(max_new_tokens=128)
@mixing_options
@runtime_options
def generate(
    console: Console,
    *,
    bundle: Path,
    prompt: str | None,
    file: Path | None,
    student: bool,
    provider: str,
    threads: int | None,
    verify: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the mixture in BUNDLE, or with its student.

    The text appears as it comes. Without PROMPT and --file, the prompt is read from stdin. A line end at the end of a
    file or of stdin is left out.
    """
    check_student(student, sampling["weights"])
    text = read_prompt(prompt, file)

    from edgemix.runtime import Mixture

    with Mixture.load(bundle, provider=provider, threads=threads, verify=verify, student=student) as mixture:
        if console.as_json:
            told = {"prompt": text, "provider": mixture.provider, "student": student}
            console.document(told | asdict(mixture.generate(text, **sampling)))
            return
        completion = None
        for chunk in mixture.stream(text, **sampling):
            console.write(chunk.text)
            completion = chunk.completion
        console.line()
    if completion is not None and sys.stderr.isatty():
        console.note(f"{summary(completion)}, on {mixture.provider}")


def summary(completion: Completion) -> str:
    """One line about a finished text: its length, its speed, why it ended."""
    timings, tokens = completion.timings, len(completion.token_ids)
    parts = [f"{tokens} tokens", f"first after {timings.ttft:.2f} s"]
    if tokens > 1:
        parts.append(f"{timings.decode_rate:.1f} tokens/s")
    ended = {"stop": "ended by itself", "length": "length reached"}
    return ", ".join([*parts, ended[completion.finish_reason]])
