"""`edgemix generate`: continue a text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import (
    bundle_argument,
    check_student,
    form_options,
    mixing_options,
    runtime_options,
    sampling_options,
)
from edgemix.cli.texts import read_prompt, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgemix.cli.console import Console
    from edgemix.runtime import Completion


_LONG = 8_000
"""Characters of a prompt that takes a while to read, so that progress is shown."""


@command(
    "generate",
    example='edgemix generate mixture "The prime numbers are" -n 64\n'
    "edgemix generate mixture --file story.txt --temperature 0.8 --seed 1\n"
    'echo "def area(radius):" | edgemix generate mixture --weights code=1\n'
    'edgemix generate mixture "Once upon a time" --student\n'
    'edgemix generate mixture "Is 7 prime? " --choice yes --choice no',
    extra="cpu",
    kept="The text so far is all there is.",
)
@bundle_argument
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@sampling_options(max_new_tokens=128)
@form_options
@click.option("--attribution", is_flag=True, help="Tell which member spoke: its share in every token.")
@mixing_options
@runtime_options
def generate(
    console: Console,
    *,
    bundle: Path,
    prompt: str | None,
    file: Path | None,
    json_schema: Path | None,
    student: bool,
    provider: str,
    threads: int | None,
    verify: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with the mixture in BUNDLE, or with its student.

    The text appears as it comes. Without PROMPT and --file, the prompt is read from stdin. A line end at the end of a
    file or of stdin is left out.

    --json-schema, --regex and --choice hold the text to a form: the mixture's distribution over the texts of that form
    stays as it is. With --attribution a terminal shows each piece of text in the colour of the member that had most
    share in it, and a table tells how much everyone spoke.
    """
    check_student(student, options["weights"])
    text = read_prompt(prompt, file)
    if json_schema is not None:
        options["json_schema"] = read_text(json_schema)
    if len(text) > _LONG:
        options["progress"] = console.progress

    from edgemix.runtime import Mixture

    with Mixture.load(bundle, provider=provider, threads=threads, verify=verify, student=student) as mixture:
        if console.as_json:
            told = {"prompt": text, "provider": mixture.provider, "student": student, "members": mixture.members}
            console.document(told | asdict(mixture.generate(text, **options)))
            return
        completion = None
        for chunk in mixture.stream(text, **options):
            speaker = None if chunk.responsibilities is None else int(chunk.responsibilities.sum(axis=0).argmax())
            console.write(chunk.text, colour=speaker)
            completion = chunk.completion
        console.line()
        if completion is not None and completion.responsibilities is not None:
            console.line()
            show_speakers(console, mixture.members, completion.responsibilities)
    if completion is not None and sys.stderr.isatty():
        console.note(f"{summary(completion)}, on {mixture.provider}")


def show_speakers(console: Console, members: Sequence[str], responsibilities: NDArray[np.float64]) -> None:
    """How much every member spoke, from its shares [tokens, members]."""
    speakers = responsibilities.argmax(axis=1).tolist()
    shares = zip(members, responsibilities.mean(axis=0), map(speakers.count, range(len(members))), strict=True)
    console.table(
        "Who spoke",
        ("", "Share (%)", "Tokens with most of it"),
        [(name, f"{100 * share:.1f}", str(tokens)) for name, share, tokens in shares],
        coloured=True,
    )


def summary(completion: Completion) -> str:
    """One line about a finished text: its length, its speed, why it ended."""
    timings, tokens = completion.timings, len(completion.token_ids)
    parts = [f"{tokens} tokens", f"first after {timings.ttft:.2f} s"]
    if tokens > 1:
        parts.append(f"{timings.decode_rate:.1f} tokens/s")
    ended = {"stop": "ended by itself", "length": "length reached"}
    return ", ".join([*parts, ended[completion.finish_reason]])
