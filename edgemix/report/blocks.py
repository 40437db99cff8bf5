"""What a report consists of, before it is HTML: sections, and in them figures, tables, texts and what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Tile:
    """One large figure: its value, its unit, what it is, and what it is to be held against."""

    value: str
    unit: str
    what: str
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell.

    Attributes:
        text: What it says.
        tone: Of the dot before it, or of its ground in a heat map; see `palette`.
        strong: Whether it is the one to look at.
    """

    text: str
    tone: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first `left` columns are names, the others figures.

    Attributes:
        title: Above it.
        folded: Whether it is shown only when asked for, as a chart's figures are.
        heat: Whether tones are the cells' grounds.
        legend: What the grounds mean.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int = 1
    folded: bool = False
    heat: bool = False
    legend: tuple[Cell, ...] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart.

    Attributes:
        id: In the page.
        title: What it shows.
        drawing: It, as SVG at two widths.
        caption: How to read it.
        legend: What its colours stand for, where it does not say so itself.
        table: Its figures.
    """

    id: str
    title: str
    drawing: Markup
    caption: str = ""
    legend: tuple[Cell, ...] = ()
    table: Table | None = None
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens that one member leads: their text; its name, its tone, and how strongly it shows (0 to 4)."""

    text: str
    member: str
    tone: str
    level: int
    origin: str = ""


@dataclass(frozen=True, slots=True)
class ColouredText:
    """A text, in the colours of who leads where."""

    id: str
    title: str
    stretches: tuple[Stretch, ...]
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True)
class Note:
    """A remark; `missing` where it says what would have to be given for more."""

    text: str
    missing: bool = False
    kind: ClassVar[str] = "note"


Block = Table | Figure | ColouredText | Note


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report under a heading.

    Attributes:
        id: In the page.
        title: Its heading.
        lead: What it says, in a sentence.
        blocks: What it holds.
    """

    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


def legend(tones: Mapping[str, str]) -> tuple[Cell, ...]:
    """What colours stand for, from name -> tone."""
    return tuple(Cell(name, tone) for name, tone in tones.items())


def row(*cells: str | Cell) -> tuple[Cell, ...]:
    """A table's row, of cells or plain texts."""
    return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
