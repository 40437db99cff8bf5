"""What a report is made of, and what its sections ask of it: sizes, tones, which row is the mixture's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from edgemix.errors import InputError
from edgemix.report import formatting
from edgemix.report.charts.palette import member_tones

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.results.evaluation import Evaluation, Passage, Row
    from edgemix.results.profile import Profile, Subject

_MOST = 1e18
"""No figure of a profile is larger."""


@dataclass(frozen=True, slots=True)
class Material:
    """All that a report may tell of.

    Attributes:
        bundle: What the bundle is called.
        manifest: Its own.
        evaluation: What was found on texts.
        passages: Who speaks where in them.
        profile: What was measured on a machine.
    """

    bundle: str
    manifest: Manifest
    evaluation: Evaluation | None = None
    passages: tuple[Passage, ...] = ()
    profile: Profile | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in order."""
        return tuple(entry.name for entry in self.manifest.members)

    @property
    def tones(self) -> dict[str, str]:
        """Every graph's name -> its tone."""
        student = {} if self.manifest.student is None else {self.manifest.student.name: "student"}
        return member_tones(self.members) | student

    @property
    def size(self) -> int:
        """Of the whole bundle, in bytes."""
        return sum(entry.size for entry in self.manifest.files.values())

    def size_of(self, entries: Iterable[MemberEntry]) -> int:
        """Of graphs and the files beside them, in bytes; a graph that members share counts once."""
        folders = {PurePosixPath(entry.graph).parent for entry in entries}
        return sum(
            file.size
            for name, file in self.manifest.files.items()
            if any(PurePosixPath(name).is_relative_to(folder) for folder in folders)
        )

    def size_of_row(self, row: Row) -> int:
        """Of what a row of the evaluation needs, in bytes."""
        if row.kind == "mixture":
            return self.size_of(self.manifest.members)
        return self.size_of(entry for entry in self.manifest.graphs if entry.name == row.name)

    def tone_of(self, subject: Subject) -> str:
        """Of something that was profiled."""
        if subject.kind == "mixture":
            return "soft" if "plain" in subject.name else "ink"
        return "student" if subject.kind == "student" else self.tones.get(subject.name, "soft")

    def format_of(self, row: Row) -> str:
        """Of what a row of the evaluation is of."""
        mine = [entry.format for entry in self.manifest.graphs if row.kind == "mixture" or entry.name == row.name]
        return formatting.listed(sorted(set(mine)))

    @property
    def formats(self) -> tuple[str, ...]:
        """The members', each once, in the members' order."""
        return tuple(dict.fromkeys(entry.format for entry in self.manifest.members))


def check_profile(profile: Profile) -> None:
    """Find out whether a profile's figures can be drawn: a file may hold any.

    Raises:
        InputError: A number in it is negative or absurdly large, or something took no time.
    """
    for where, value in _numbers(msgspec.to_builtins(profile), ""):
        if not 0 <= value <= _MOST or (value == 0 and where.endswith((".p50", ".p90", ".p99", ".size"))):
            raise InputError(f"the profile's {where} is {value}, and cannot be", "Make the profile again.")


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Every number in a document, and where it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{where}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield where, value


def own_row(evaluation: Evaluation) -> Row:
    """The mixture with the bundle's own weights (a member may have its name, and comes first)."""
    return next(row for row in reversed(evaluation.rows) if row.name == evaluation.mixture)


def best_member(evaluation: Evaluation) -> Row:
    """The member that predicts all texts best."""
    members = [row for row in evaluation.rows if row.kind == "member"]
    return min(members, key=lambda row: row.overall.bits_per_byte)


def label(row: Row, evaluation: Evaluation) -> str:
    """A row of the evaluation by its name, which says that it is a mixture."""
    if row.kind != "mixture":
        return formatting.name(row.name)
    return f"mixture, {formatting.name(row.name)}" + (
        " weights" if row.name in {evaluation.mixture, "adaptive"} else ""
    )
