"""`edgemix guide`: the manual, which is shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import click

from edgemix.cli.command import command

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from edgemix.cli.console import Console


@command("guide", example="edgemix guide\nedgemix guide export\nedgemix guide serving | less")
@click.argument("topic", required=False)
def guide(console: Console, topic: str | None) -> None:
    """Show a page of the manual.

    Without TOPIC, the topics are listed. Needs no network.
    """
    from edgemix.errors import InputError

    pages = {page.name.removesuffix(".md"): page for page in _pages()}
    if topic is None:
        titles = {name: _title(page) for name, page in pages.items()}
        console.table("Topics", ("", ""), list(titles.items()), left=2)
        console.line("Show one: edgemix guide TOPIC")
        if console.as_json:
            console.document({"topics": titles})
        return
    if topic not in pages:
        raise InputError(f"there is no topic {topic[:80]!r}", f"Choose one of: {', '.join(pages)}.")
    text = pages[topic].read_text("utf-8")
    if console.as_json:
        console.document({"topic": topic, "text": text})
        return
    console.markdown(text)


def _pages() -> list[Traversable]:
    """Return the pages of the manual, by name."""
    folder = files("edgemix") / "guide"
    return sorted((page for page in folder.iterdir() if page.name.endswith(".md")), key=lambda page: page.name)


def _title(page: Traversable) -> str:
    """Return a page's first line, which is its heading."""
    return page.read_text("utf-8").partition("\n")[0].removeprefix("# ")
