"""`edgemix generate`: continue a prompt."""

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
    constraint_options,
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


_LONG_PROMPT = 8_000
"""Characters from which prefill takes long enough to show progress."""


@command(
    "generate",
    example='edgemix generate mixture "The prime numbers are" -n 64\n'
    "edgemix generate mixture --file story.txt --temperature 0.8 --seed 1\n"
    'echo "def area(radius):" | edgemix generate mixture --weights code=1\n'
    'edgemix generate mixture "Once upon a time" --student\n'
    'edgemix generate mixture "Is 7 prime? " --choice yes --choice no',
    extra="cpu",
    on_interrupt="The text so far is not stored.",
)
@bundle_argument
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@sampling_options(max_new_tokens=128)
@constraint_options
@click.option("--attribution", is_flag=True, help="Show each member's share in every token.")
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
    """Continue PROMPT with the mixture or student in BUNDLE.

    The text is streamed. Without PROMPT and --file, the prompt is read from stdin. A final line end of a file or of
    stdin is dropped.

    --json-schema, --regex and --choice constrain the text: tokens that cannot lead to a valid text are excluded. With
    --attribution, each piece of text has the color of the member with the largest share in it, on a terminal, and a
    table shows each member's share.
    """
    check_student(student, options["weights"])
    text = read_prompt(prompt, file)
    if json_schema is not None:
        options["json_schema"] = read_text(json_schema)
    if len(text) > _LONG_PROMPT:
        options["progress"] = console.progress

    from edgemix.runtime import Mixture

    with Mixture.load(bundle, provider, threads, verify, student=student) as mixture:
        if console.as_json:
            weights = mixture.resolve_weights(options["weights"], options["combine"])
            header = {"prompt": text, "provider": mixture.provider, "student": student, "members": mixture.members}
            header["weights"] = weights
            console.document(header | asdict(mixture.generate(text, **options)))
            return
        completion = None
        for chunk in mixture.stream(text, **options):
            top_member = None if chunk.responsibilities is None else int(chunk.responsibilities.sum(axis=0).argmax())
            console.write(chunk.text, color=top_member)
            completion = chunk.completion
        console.line()
        if completion is not None and completion.responsibilities is not None:
            console.line()
            show_attribution(console, mixture.members, completion.responsibilities)
    if completion is not None and sys.stderr.isatty():
        weights = mixture.resolve_weights(options["weights"], options["combine"])
        named = f", {weights} weights" if isinstance(weights, str) and len(mixture.members) > 1 else ""
        console.note(f"{summary(completion)}, on {mixture.provider}{named}")


def show_attribution(console: Console, members: Sequence[str], responsibilities: NDArray[np.float64]) -> None:
    """Print each member's mean share, from the shares per token [tokens, members]."""
    top_members = responsibilities.argmax(axis=1).tolist()
    shares = zip(members, responsibilities.mean(axis=0), map(top_members.count, range(len(members))), strict=True)
    console.table(
        "Attribution",
        ("", "Share (%)", "Tokens with the largest share"),
        [(name, f"{100 * share:.1f}", str(tokens)) for name, share, tokens in shares],
        colored=True,
    )


def summary(completion: Completion) -> str:
    """Return one line about a finished text: its length, its speed, and why it ended."""
    timings, tokens = completion.timings, len(completion.token_ids)
    parts = [f"{tokens} tokens", f"time to first token {timings.ttft:.2f} s"]
    if tokens > 1:
        parts.append(f"{timings.decode_rate:.1f} tokens/s")
    reasons = {"stop": "stopped", "length": "maximum length reached"}
    return ", ".join([*parts, reasons[completion.finish_reason]])
