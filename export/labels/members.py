"""The members of a mixture over labels, as the bundle holds them: graphs in their formats, and rules."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgemix.bundle.label_bundle.manifest import EncoderMember, RulesMember, member_folder
from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, storage_errors
from edgemix.export.context import run_stage
from edgemix.export.graphs.encoder import build_encoder, encoder_inputs, save_encoder
from edgemix.export.labels.examples import label_sets, targets_of, texts_of
from edgemix.export.labels.loading import load_classifier, save_tokenizer
from edgemix.export.labels.parity import TEXTS, against_fp32, against_torch, all_rows, enforce
from edgemix.export.models.location import locate
from edgemix.export.quantization import quantize
from edgemix.formats import FORMAT_SPECS
from edgemix.progress import NO_PROGRESS, PrefixedProgress, Progress
from edgemix.recipe.rules_file import RuleSet, entries_of
from edgemix.runtime.classification.members import open_encoder
from edgemix.runtime.classification.rules import RuleMatcher
from edgemix.runtime.graphs.encoder import EncoderGraph
from edgemix.runtime.graphs.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.bundle.label_bundle.manifest import LabelMember, LabelQuantizationParity
    from edgemix.bundle.writer import BundleWriter
    from edgemix.export.labels.examples import RecipeExamples
    from edgemix.export.labels.loading import LoadedClassifier
    from edgemix.export.labels.parity import Logits
    from edgemix.recipe.labeled import Example
    from edgemix.recipe.labels import LabelMemberRecipe, LabelRecipe
    from edgemix.runtime.classification.encoding import EncodedText, TextEncoder

MODEL_FILE = "model.onnx"
_PROBES = ("a", "Hello, world.", "one two three four five six seven eight nine ten " * 3)
"""Texts on which a graph is compared with torch where the recipe has none."""


class LabelMemberExporter:
    """Writes the members of a recipe to its bundle; each is a stage that a later export takes up.

    Args:
        recipe: A checked recipe.
        writer: The bundle's.
        examples: The recipe's examples.
        force: Whether formats over their limits are accepted.
        progress: Progress callback.
    """

    def __init__(
        self,
        recipe: LabelRecipe,
        writer: BundleWriter,
        examples: RecipeExamples,
        *,
        force: bool = False,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        self._recipe, self._writer, self._examples = recipe, writer, examples
        self._force, self._progress = force, progress

    def export(self, spec: LabelMemberRecipe) -> LabelMember:
        """Export a member.

        Raises:
            InputError: It cannot be read, its type cannot be exported, or its labels are not the recipe's.
            ParityError: A graph is too far from its source.
        """
        if spec.rules is not None:
            return self._rules(spec)
        recipe, folder = self._recipe, self._writer.folder / member_folder(spec.name)
        location = locate(spec.model or "", recipe.folder)
        adapter = locate(spec.adapter, recipe.folder) if spec.adapter else None
        key = stage_key(
            model=location.sha256(),
            adapter=adapter and adapter.sha256(),
            member=spec,
            task=recipe.task,
            multi_label=recipe.multi_label,
            labels=recipe.labels,
            format=self._format(spec),
            quantization=recipe.quantization,
            target=recipe.target,
            max_length=recipe.max_length,
            examples=[self._examples.judged, self._examples.calibration],
        )
        progress = PrefixedProgress(self._progress, spec.name)
        entry = run_stage(
            self._writer, f"member/{spec.name}", key, lambda: self._model(spec, folder, progress), EncoderMember,
            files=[folder],
        )  # fmt: skip
        if entry.quantization is not None:
            forced = enforce(entry.quantization, forced=self._force, member=spec.name)
            entry = msgspec.structs.replace(entry, forced=forced)
            if forced:
                progress.log("over its parity limits, kept because the export is forced")
        return entry

    def _format(self, spec: LabelMemberRecipe) -> str:
        return spec.format or self._recipe.format

    def _rules(self, spec: LabelMemberRecipe) -> RulesMember:
        recipe = self._recipe
        rules = RuleSet.load(recipe.resolve(spec.rules or ""))
        matcher = RuleMatcher(rules)  # its patterns are compiled: mistakes in them are found now
        own = matcher.word_labels if recipe.task == "token-classification" else matcher.labels
        labels = tuple(spec.labels.get(label, label) for label in own)
        if recipe.labels and (others := [label for label in labels if label not in recipe.labels]):
            raise InputError(
                f"{spec.name}: its labels are {', '.join(labels)}; {', '.join(others)} are none of the recipe's, which "
                f"are {', '.join(recipe.labels)}",
                f"Give the labels' names under labels: of {spec.name}.",
            )
        path = f"{member_folder(spec.name)}/rules.json"
        file = self._writer.folder / path
        with storage_errors(f"writing {file}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(rules.save())
        return RulesMember(name=spec.name, labels=labels, rules=path, entries=sum(1 for _ in entries_of(rules)))

    def _model(self, spec: LabelMemberRecipe, folder: Path, progress: Progress) -> EncoderMember:
        recipe, writer = self._recipe, self._writer
        shutil.rmtree(folder, ignore_errors=True)
        with progress.stage(f"load {locate(spec.model or '', recipe.folder).name}"):
            member = load_classifier(spec, recipe)
        tokenizer = save_tokenizer(member, writer.folder, recipe.max_length)
        encoder = open_encoder(writer.folder, tokenizer)
        source = writer.scratch / f"{spec.name}.graph" / MODEL_FILE
        with progress.stage("graph"), storage_errors(f"writing {source}"):
            save_encoder(build_encoder(member.model), source)
        graph = EncoderGraph.load(source, PROVIDERS["cpu"], name=spec.name)
        judged = self._encode(encoder, self._examples.judged)
        probes = judged[:: max(1, len(judged) // TEXTS)][:TEXTS] or encoder.encode_batch(_PROBES)
        with progress.stage("parity with torch"):
            parity = against_torch(member.model, graph, encoder, probes)
        entry = EncoderMember(
            name=spec.name,
            labels=member.labels,
            graph=f"{member_folder(spec.name)}/{MODEL_FILE}",
            format=self._format(spec),  # type: ignore[arg-type]
            source=member.source,
            inputs=encoder_inputs(member.model),
            tokenizer=tokenizer,
            parity=parity,
            cost=float(_body_parameters(member)),
        )
        quantization = self._quantize(entry, source, encoder, progress)
        shutil.rmtree(source.parent)
        return msgspec.structs.replace(entry, quantization=quantization)

    def _quantize(
        self, entry: EncoderMember, source: Path, encoder: TextEncoder, progress: Progress
    ) -> LabelQuantizationParity | None:
        """Write the graph in its format, and measure how far it is from the fp32 graph; None for fp32."""
        output, recipe = self._writer.folder / entry.graph, self._recipe
        spec = FORMAT_SPECS[entry.format]
        windows = [text.ids.tolist() for text in self._encode(encoder, self._examples.calibration)]
        if spec.calibration == "required" and not windows:
            raise InputError(
                f"{entry.name}: the format {entry.format} observes activations, and the recipe has no examples",
                "Name some under data: calibration: (labels are not needed), or choose another format.",
            )
        with progress.stage(entry.format), storage_errors(f"writing {output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            quantize(
                source,
                output,
                entry.format,
                target=recipe.target,
                algorithm="hqq" if recipe.quantization.algorithm == "hqq" else "rtn",
                group=recipe.quantization.group,
                calibration=windows if spec.calibration != "none" else None,
                progress=progress,
            )
        if spec.reference:
            return None
        judged = self._encode(encoder, self._examples.judged) or encoder.encode_batch(_PROBES)
        with progress.stage("parity"):
            p, q = (
                all_rows(EncoderGraph.load(path, PROVIDERS["cpu"], name=entry.name), encoder, judged)
                for path in (source, output)
            )
        metric = None
        if recipe.task == "text-classification" and self._examples.validation:
            metric = ("accuracy", self._accuracy(entry, p), self._accuracy(entry, q))
        return against_fp32(p, q, format=entry.format, multi_label=recipe.multi_label, metric=metric)

    def _accuracy(self, entry: EncoderMember, logits: Logits) -> float:
        """Return the share of judged examples whose labels are right, of those whose labels the member knows."""
        rows = np.stack(logits)
        if self._recipe.multi_label:
            return float(((rows > 0) == label_sets(self._examples.judged, entry.labels)).all(axis=-1).mean())
        targets = targets_of(self._examples.judged, entry.labels)
        known = targets >= 0
        return float((rows.argmax(axis=-1) == targets)[known].mean()) if known.any() else 0.0

    def _encode(self, encoder: TextEncoder, examples: Sequence[Example]) -> list[EncodedText]:
        texts, pairs = texts_of(examples)
        return encoder.encode_batch(texts, pairs) if texts else []


def _body_parameters(member: LoadedClassifier) -> int:
    """Return the number of weights outside of embeddings, which are looked up and not multiplied."""
    embeddings = sum(weight.numel() for weight in member.model.get_input_embeddings().parameters())
    return int(max(1, member.source.parameters - embeddings))
