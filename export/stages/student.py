"""The student: distilled from the mixture, then exported as any member."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.manifest import STUDENT, Manifest, MemberEntry
from edgemix.export.distillation.distill import default_device, make_student
from edgemix.export.distillation.teacher import teacher_in_export
from edgemix.export.drafting.draft_head import make_draft
from edgemix.export.stages.members import own_folder
from edgemix.recipe.schema import MemberRecipe
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgemix.export.context import ExportContext
    from edgemix.export.stages.members import MemberExporter
    from edgemix.export.stages.models import MemberModels
    from edgemix.recipe.compression import Student


def export_student(
    context: ExportContext,
    student: Student,
    manifest: Manifest,
    *,
    models: MemberModels,
    exporter: MemberExporter,
    tokenizer: PreTrainedTokenizerBase,
) -> MemberEntry:
    """Distill the mixture with its weights, and write the student's graph and its draft graph."""
    recipe, writer, progress = context.recipe, context.writer, context.progress
    weights, specs = manifest.weights.default, {spec.name: spec for spec in recipe.members}
    with Mixture.assemble(writer.folder, manifest) as mixture:
        teacher = teacher_in_export(mixture, weights, lambda name: models.load(specs[name]), default_device())
        model = make_student(recipe, weights, teacher, writer.scratch / "distillation", progress)
    spec = MemberRecipe(STUDENT, str(model), format=student.format)
    entry = exporter.entry(spec, exporter.export(spec, in_mixture=False))
    licenses = {member.source.license for member in manifest.members}
    license_id = None if None in licenses else ", ".join(sorted(filter(None, licenses)))
    source = msgspec.structs.replace(entry.source, model="distilled from the mixture", license=license_id)
    folder, known = writer.folder / own_folder(spec), manifest.tokenizer
    draft = make_draft(recipe, entry, folder, tokenizer=tokenizer, known=known, progress=progress)
    return msgspec.structs.replace(entry, source=source, draft=draft)
