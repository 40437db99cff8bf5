"""The data that a report is made from, and the lookups that its sections share: sizes, colors, the mixture's row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.errors import InputError
from edgemix.report import formatting
from edgemix.report.charts.palette import member_colors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.results.evaluation import Evaluation, Row, WeightTrace
    from edgemix.results.profile import Profile, TargetResult

_LARGEST_FIGURE = 1e18
"""Upper bound of every number in a profile."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything that a report can show.

    Attributes:
        bundle: The bundle's name.
        manifest: The bundle's manifest.
        evaluation: How well members and mixtures predict texts.
        traces: The members' adaptive weights along those texts.
        profile: Latency, memory and operator times on one machine.
    """

    bundle: str
    manifest: Manifest
    evaluation: Evaluation | None = None
    traces: tuple[WeightTrace, ...] = ()
    profile: Profile | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in the manifest's order."""
        return tuple(entry.name for entry in self.manifest.members)

    @property
    def colors(self) -> dict[str, str]:
        """Name of each member and of the student -> name of its color."""
        student = {} if self.manifest.student is None else {self.manifest.student.name: "student"}
        return member_colors(self.members) | student

    @property
    def size(self) -> int:
        """Bytes of the whole bundle."""
        return sum(entry.size for entry in self.manifest.files.values())

    def size_of(self, entries: Iterable[MemberEntry]) -> int:
        """Return the bytes of graphs and the files beside them; a graph that members share counts once."""
        folders = {PurePosixPath(entry.graph).parent for entry in entries}
        return sum(
            file.size
            for name, file in self.manifest.files.items()
            if any(PurePosixPath(name).is_relative_to(folder) for folder in folders)
        )

    def size_of_row(self, row: Row) -> int:
        """Return the bytes of the graphs that a row of the evaluation needs."""
        if row.kind == "mixture":
            return self.size_of(self.manifest.members)
        return self.size_of(entry for entry in self.manifest.graphs if entry.name == row.name)

    def color_of(self, result: TargetResult) -> str:
        """Return the name of a profiled model's color."""
        if result.kind == "mixture":
            return "muted" if "plain" in result.name else "text"
        return "student" if result.kind == "student" else self.colors.get(result.name, "muted")

    def format_of(self, row: Row) -> str:
        """Return the weight formats of the graphs that a row of the evaluation needs."""
        formats = [entry.format for entry in self.manifest.graphs if row.kind == "mixture" or entry.name == row.name]
        return formatting.join(sorted(set(formats)))

    @property
    def formats(self) -> tuple[str, ...]:
        """The members' weight formats, each once, in the members' order."""
        return tuple(dict.fromkeys(entry.format for entry in self.manifest.members))


def check_profile(profile: Profile) -> None:
    """Check that a profile's numbers can be drawn; a file may hold any.

    Raises:
        InputError: A number is negative or larger than 1e18, or a time that must be above zero is zero.
    """
    for where, value in _numbers(msgspec.to_builtins(profile), ""):
        if not 0 <= value <= _LARGEST_FIGURE or (value == 0 and where.endswith((".p50", ".p90", ".p99", ".size"))):
            raise InputError(
                f"the profile's {where} is {value}, which is out of range",
                "Make the profile again: edgemix profile BUNDLE -o FILE",
            )


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Yield every number in a document with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{where}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield where, value


def mixture_row(evaluation: Evaluation) -> Row:
    """Return the row of the mixture with the bundle's own weights.

    Rows are searched from the end: a member may have the same name, and members come first.
    """
    return next(row for row in reversed(evaluation.rows) if row.name == evaluation.mixture)


def best_member(evaluation: Evaluation) -> Row:
    """Return the row of the member with the fewest bits per byte over all texts."""
    members = [row for row in evaluation.rows if row.kind == "member"]
    return min(members, key=lambda row: row.overall.bits_per_byte)


def row_label(row: Row, evaluation: Evaluation) -> str:
    """Return a row's name for people; a mixture's says that it is one, and which weights it has."""
    if row.kind != "mixture":
        return formatting.name(row.name)
    return f"mixture, {formatting.name(row.name)}" + (
        " weights" if row.name in {evaluation.mixture, "adaptive"} else ""
    )
