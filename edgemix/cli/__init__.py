"""The command line: parse arguments, call the library, print the results."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from edgemix import __version__
from edgemix.cli.failures import redeliver_interrupt, report_failures

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "export": "commands.export:export",
    "generate": "commands.generate:generate",
    "chat": "commands.chat:chat",
    "predict": "labels.predict:predict",
    "feedback": "labels.feedback:feedback",
    "evaluate": "commands.evaluate:evaluate",
    "lm-eval": "lm_eval.command:lm_eval",
    "fit-weights": "commands.evaluate:fit_weights",
    "profile": "commands.profile:profile",
    "inspect": "commands.bundle:inspect",
    "verify": "commands.bundle:verify",
    "doctor": "commands.doctor:doctor",
    "init": "commands.init:init",
    "finetune": "commands.finetune:finetune",
    "distill": "commands.distill:distill",
    "prune": "commands.prune:prune",
    "report": "commands.report:report",
    "demo": "commands.demo:demo",
    "guide": "commands.guide:guide",
}
"""Command name -> module:function; a module is imported when its command is called."""


class Edgemix(click.Group):
    """The `edgemix` group: imports commands on demand, and turns every failure into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"edgemix.cli.{module}"), name)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 - failures are always reported here, not by click
        **extra: Any,
    ) -> Any:
        """Run one command and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        with report_failures(as_json="--json" in arguments):
            code = super().main(arguments, prog_name or "edgemix", complete_var, standalone_mode=False, **extra)
            sys.exit(code or 0)


@click.group(
    cls=Edgemix,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  edgemix init recipe.yaml\n  edgemix export recipe.yaml -o mixture\n"
    '  edgemix generate mixture "The prime numbers are"\n\nA command\'s own help: edgemix COMMAND --help.',
)
@click.version_option(__version__, prog_name="edgemix", message="%(prog)s %(version)s")
@click.pass_context
def edgemix(ctx: click.Context) -> None:
    """Turn several models into one small mixture that runs anywhere.

    `export` builds a bundle of ONNX graphs from a recipe; most other commands run, measure or describe a bundle.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the `edgemix` program."""
    for stream in (sys.stdout, sys.stderr):
        # Replace characters that the terminal cannot show, rather than fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.unraisablehook = redeliver_interrupt
    edgemix()
