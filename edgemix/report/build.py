"""The page: all sections, by a template that escapes whatever it is given."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from edgemix import __version__
from edgemix.report import formatting
from edgemix.report.blocks import ColouredText, Figure, Note, Section, Table, row
from edgemix.report.charts.palette import MEMBER_TONES, style_sheet
from edgemix.report.data import Material, check_profile
from edgemix.report.sections.bundle import bundle_section
from edgemix.report.sections.hardware import hardware_section
from edgemix.report.sections.quality import quality_section
from edgemix.report.sections.speed import speed_section
from edgemix.report.sections.summary import answer, tiles
from edgemix.report.sections.text import LEVELS, text_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.bundle.manifest import Manifest
    from edgemix.results.evaluation import Evaluation, Passage
    from edgemix.results.profile import Profile


@dataclass(frozen=True, slots=True)
class Page:
    """A report.

    Attributes:
        html: The page.
        shown: The titles of its figures, tables and texts.
        missing: What would have to be given for more, a sentence each.
    """

    html: str
    shown: tuple[str, ...]
    missing: tuple[str, ...]


def build_report(
    bundle: str,
    manifest: Manifest,
    *,
    evaluation: Evaluation | None = None,
    passages: Sequence[Passage] = (),
    profile: Profile | None = None,
    created: datetime | None = None,
) -> Page:
    """A bundle's report as one HTML page: no script, nothing that it loads. What is not given, it names.

    Args:
        bundle: What the bundle is called.
        manifest: What it says of itself.
        evaluation: What was found on texts.
        passages: Who speaks where in them.
        profile: What was measured on a machine.
        created: When; now by default.

    Raises:
        InputError: The profile has figures that cannot be.
    """
    if profile is not None:
        check_profile(profile)
    material = Material(bundle, manifest, evaluation, tuple(passages), profile)
    makers = (quality_section, text_section, speed_section, hardware_section, bundle_section)
    told = sorted((make(material) for make in makers), key=_is_missing)
    sections = [*told, _making(material)]
    blocks = [block for section in sections for block in section.blocks]
    return Page(
        _render(material, sections, created or datetime.now(UTC)),
        tuple(block.title for block in blocks if isinstance(block, Figure | Table | ColouredText)),
        tuple(block.text for block in blocks if isinstance(block, Note) and block.missing),
    )


def _render(material: Material, sections: Sequence[Section], created: datetime) -> str:
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
        f".{tone}.l{level}{{background:color-mix(in srgb,var(--{tone}) {8 + 8 * level}%,transparent)}}"
        for tone in MEMBER_TONES
        for level in range(1, LEVELS + 1)
    )
    return environment.get_template("page.html").render(
        title=f"{formatting.name(material.bundle)}: report",
        bundle=formatting.name(material.bundle),
        answer=answer(material),
        tiles=tiles(material),
        sections=sections,
        created=created,
        version=__version__,
        style=Markup(f"{style_sheet()}{style}{levels}"),  # noqa: S704 - of this package's own files and table
    )


def _is_missing(section: Section) -> bool:
    """Whether all that a section has to say is what would have to be given."""
    return all(isinstance(block, Note) and block.missing for block in section.blocks)


def _finalize(value: object) -> object:
    """What the template prints, before it is escaped: no character that is none."""
    return formatting.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _making(material: Material) -> Section:
    """How it was measured, for whoever wants to measure it again."""
    manifest, profile = material.manifest, material.profile
    rows = [
        row(
            "Bundle",
            f"{formatting.size(material.size)} in {len(manifest.files)} files, manifest {manifest.checksum[:12]}",
        ),
        row("Tokenizer", f"{manifest.tokenizer.vocabulary:,} tokens, {manifest.tokenizer.sha256[:12]}"),
        row("Made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "not told"),
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
                f"{profile.created}, in {formatting.seconds(profile.seconds)}{', in a hurry' if profile.quick else ''}",
            ),
        ]
        if profile.digest != manifest.checksum:
            notes.append(Note("The profile was made of another state of this bundle, or of another bundle."))
    return Section("making", "How this was made", "", (Table("Made of", ("", ""), tuple(rows), left=2), *notes))
