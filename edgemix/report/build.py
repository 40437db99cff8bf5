"""Build the report's page from its sections with a Jinja template that escapes all text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from edgemix import __version__
from edgemix.report import formatting
from edgemix.report.blocks import ColoredText, Figure, Note, Section, Table, row
from edgemix.report.charts.palette import MEMBER_COLORS, style_sheet
from edgemix.report.data import ReportData, check_profile
from edgemix.report.sections.bundle import bundle_section
from edgemix.report.sections.hardware import hardware_section
from edgemix.report.sections.quality import quality_section
from edgemix.report.sections.speed import speed_section
from edgemix.report.sections.summary import kpis, summary
from edgemix.report.sections.weight_traces import LEVELS, weight_traces_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.bundle.manifest import Manifest
    from edgemix.results.evaluation import Evaluation, WeightTrace
    from edgemix.results.profile import Profile


@dataclass(frozen=True, slots=True)
class Page:
    """A report.

    Attributes:
        html: The page.
        shown: The titles of its figures, tables and texts.
        missing: The inputs that would add more to the page, a sentence each.
    """

    html: str
    shown: tuple[str, ...]
    missing: tuple[str, ...]


def build_report(
    bundle: str,
    manifest: Manifest,
    *,
    evaluation: Evaluation | None = None,
    traces: Sequence[WeightTrace] = (),
    profile: Profile | None = None,
    created: datetime | None = None,
) -> Page:
    """Build a bundle's report as one HTML page without scripts or external resources.

    Inputs that are left out are named in the page, with the command that produces them.

    Args:
        bundle: The bundle's name.
        manifest: The bundle's manifest.
        evaluation: How well members and mixtures predict texts.
        traces: The members' adaptive weights along those texts.
        profile: Latency, memory and operator times on one machine.
        created: The time that the page shows; now by default.

    Raises:
        InputError: A number in the profile is out of range.
    """
    if profile is not None:
        check_profile(profile)
    data = ReportData(bundle, manifest, evaluation, tuple(traces), profile)
    builders = (quality_section, weight_traces_section, speed_section, hardware_section, bundle_section)
    measured_first = sorted((build(data) for build in builders), key=_is_missing)
    sections = [*measured_first, _provenance_section(data)]
    blocks = [block for section in sections for block in section.blocks]
    return Page(
        _render(data, sections, created or datetime.now(UTC)),
        tuple(block.title for block in blocks if isinstance(block, Figure | Table | ColoredText)),
        tuple(block.text for block in blocks if isinstance(block, Note) and block.missing),
    )


def _render(data: ReportData, sections: Sequence[Section], created: datetime) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgemix.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    style = environment.get_template("style.css").render()
    levels = "\n".join(
        f".{color}.l{level}{{background:color-mix(in srgb,var(--{color}) {8 + 8 * level}%,transparent)}}"
        for color in MEMBER_COLORS
        for level in range(1, LEVELS + 1)
    )
    return environment.get_template("page.html").render(
        title=f"{formatting.name(data.bundle)}: report",
        bundle=formatting.name(data.bundle),
        summary=summary(data),
        kpis=kpis(data),
        sections=sections,
        created=created,
        version=__version__,
        style=Markup(f"{style_sheet()}{style}{levels}"),  # noqa: S704 - of this package's own files and table
    )


def _is_missing(section: Section) -> bool:
    """Return whether a section holds nothing but notes on missing inputs."""
    return all(isinstance(block, Note) and block.missing for block in section.blocks)


def _finalize(value: object) -> object:
    """Replace unprintable characters in what the template prints, before it is escaped."""
    return formatting.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _provenance_section(data: ReportData) -> Section:
    """Return the section with checksums, versions and the machine, which a reader needs to repeat the measurements."""
    manifest, profile = data.manifest, data.profile
    rows = [
        row(
            "Bundle",
            f"{formatting.size(data.size)} in {len(manifest.files)} files, manifest {manifest.checksum[:12]}",
        ),
        row("Tokenizer", f"{manifest.tokenizer.vocabulary:,} tokens, {manifest.tokenizer.sha256[:12]}"),
        row(
            "Exported with",
            ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "not recorded",
        ),
    ]
    notes: list[Note] = []
    if profile is not None:
        machine = profile.machine
        rates = [] if machine.bandwidth is None else [f"{machine.bandwidth / 1e9:,.1f} GB/s"]
        rows += [
            row("Machine", f"{machine.processor}, {machine.cores} cores, {formatting.size(machine.memory)}"),
            row("Instruction sets", " ".join(machine.instruction_sets) or "unknown"),
            row("Memory bandwidth", rates[0] if rates else "not measured"),
            row("System", f"{machine.platform}, ONNX Runtime {machine.onnxruntime}, edgemix {machine.edgemix}"),
            row(
                "Profiled",
                f"{profile.created}, in {formatting.seconds(profile.seconds)}{' (--quick)' if profile.quick else ''}",
            ),
        ]
        if profile.digest != manifest.checksum:
            notes.append(Note("The profile is of another bundle or another version of this one: the checksums differ."))
    table = Table("Bundle, machine and versions", ("", ""), tuple(rows), left=2)
    return Section("provenance", "How this was measured", "", (table, *notes))
