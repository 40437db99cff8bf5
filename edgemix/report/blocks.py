"""A report's content before it becomes HTML: sections that hold figures, tables, colored texts and notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Kpi:
    """One headline number: its value, its unit, its label, and a note with what to compare it to."""

    value: str
    unit: str
    label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell.

    Attributes:
        text: The cell's text.
        color: Name of the color of the dot before the text, or of the cell's background in a heat map; see `palette`.
        emphasized: Whether the text is bold in a heat map.
        shape: The dot's shape: "circle", "square", "diamond" or "triangle-up", as Vega calls them.
    """

    text: str
    color: str = ""
    emphasized: bool = False
    shape: str = "circle"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells.

    Attributes:
        title: The heading above the table.
        columns: The columns' headings.
        rows: The cells, row by row.
        left: Number of leading columns with names, aligned left; the others hold numbers, aligned right.
        collapsed: Whether the table is hidden until the reader opens it, as the tables under charts are.
        heat: Whether cells' colors are their backgrounds.
        legend: The meaning of the backgrounds.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int = 1
    collapsed: bool = False
    heat: bool = False
    legend: tuple[Cell, ...] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart.

    Attributes:
        id: The element's id in the page.
        title: The heading above the chart.
        drawing: The chart as SVG at two widths.
        caption: How to read the chart.
        legend: The meaning of the colors, where the chart has no direct labels.
        table: The chart's numbers.
    """

    id: str
    title: str
    drawing: Markup
    caption: str = ""
    legend: tuple[Cell, ...] = ()
    table: Table | None = None
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens for which one member has the largest weight.

    Attributes:
        text: The tokens' text.
        member: The member's name.
        color: Name of the member's color.
        level: How strongly the color shows, 0 to 4.
        origin: Name of the text that begins here, in a stream of several.
    """

    text: str
    member: str
    color: str
    level: int
    origin: str = ""


@dataclass(frozen=True, slots=True)
class ColoredText:
    """A text in the colors of the members with the largest weight."""

    id: str
    title: str
    spans: tuple[Span, ...]
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True)
class Note:
    """A remark; `missing` marks one that names the input that would add more to the report."""

    text: str
    missing: bool = False
    kind: ClassVar[str] = "note"


Block = Table | Figure | ColoredText | Note


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report under a heading.

    Attributes:
        id: The element's id in the page.
        title: The heading.
        lead: One sentence under the heading.
        blocks: The content.
    """

    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


def row(*cells: str | Cell) -> tuple[Cell, ...]:
    """Return a table's row from cells or plain strings."""
    return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
