"""`edgemix chat`: have a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, check_student, mixing_options, runtime_options, sampling_options
from edgemix.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from edgemix.cli.console import Console
    from edgemix.runtime import Mixture

_HELP = "/reset clears the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@command(
    "chat",
    example='edgemix chat mixture\nedgemix chat mixture --system "Answer in one sentence." --temperature 0.7\n'
    "echo 'What is a prime number?' | edgemix chat mixture --json",
    extra="cpu",
    on_interrupt="The conversation is not stored.",
)
@bundle_argument
@click.option("--system", metavar="TEXT", help="System prompt.")
@sampling_options(max_new_tokens=512)
@mixing_options
@runtime_options
def chat(
    console: Console,
    *,
    bundle: Path,
    system: str | None,
    student: bool,
    provider: str,
    threads: int | None,
    verify: bool,
    **sampling: Any,
) -> None:
    """Chat with the mixture or student in BUNDLE.

    Messages are formatted by the tokenizer's chat template. Ctrl-C stops an answer and keeps the conversation; Ctrl-D
    or /exit leaves; /reset clears the conversation. If stdin is not a terminal, each of its lines is a message.
    """
    check_student(student, sampling["weights"])

    from edgemix.runtime import Mixture

    with Mixture.load(bundle, provider, threads, verify, student=student) as mixture:
        conversation = Conversation(console, mixture, system, sampling)
        if sys.stdin.isatty() and not console.as_json:
            conversation.talk()
        else:
            conversation.read()
        if console.as_json:
            messages = conversation.session.messages
            weights = mixture.resolve_weights(sampling["weights"], sampling["combine"])
            header = {"provider": mixture.provider, "student": student, "weights": weights}
            console.document({**header, "messages": messages})


class Conversation:
    """A session in the terminal."""

    def __init__(self, console: Console, mixture: Mixture, system: str | None, sampling: dict[str, Any]) -> None:
        self._console = console
        self._mixture = mixture
        self._start = [{"role": "system", "content": system}] if system else []
        self._sampling = sampling
        self.session = mixture.session(self._start)

    def talk(self) -> None:
        """Read messages from the terminal and answer them until the user leaves."""
        with suppress(ImportError):
            import readline  # noqa: F401 - adds a history and editing keys to `input`, if the system has it
        self._console.note(_HELP)
        while (line := self._ask()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/reset":
                    self.session = self._mixture.session(self._start)
                    self._console.note("The conversation is cleared.")
                case command if command.startswith("/"):
                    self._console.note(_HELP)
                case _:
                    try:
                        self.answer(line)
                    except InputError as error:
                        self._console.note(f"error: {error}\nThe last message was dropped.")

    def read(self) -> None:
        """Answer each line of stdin."""
        from edgemix.recipe.text_sources import decode

        for line in sys.stdin.buffer:
            message = decode(line, "stdin").strip()
            if message:
                self.answer(message)

    def answer(self, message: str) -> None:
        """Stream the answer to a message; both join the conversation, unless the answer is empty."""
        before = self.session.messages
        try:
            with closing(self.session.stream(message, **self._sampling)) as chunks:
                for chunk in chunks:
                    self._console.write(chunk.text)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._console.note("\nstopped")
        self._console.line()
        if not self.session.messages[-1]["content"]:
            self.session.messages = before

    def _ask(self) -> str | None:
        """Return the user's next line, or None when they leave."""
        while True:
            try:
                return input("> ")
            except EOFError:
                self._console.line()
                return None
            except KeyboardInterrupt:
                self._console.note("\nCtrl-D leaves.")
            except UnicodeDecodeError:
                self._console.note("That was not UTF-8; please type it again.")
