"""Recipe in, bundle out: the stages of an export in order, each kept as soon as it is done.

An interrupted export leaves its staging folder beside the output; running it again takes up every stage whose inputs
are the same, down to the bytes of the weights.
"""

from __future__ import annotations

import shutil
from functools import cache, partial
from typing import TYPE_CHECKING

import msgspec

import edgemix
from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import (
    SCHEMA,
    STUDENT,
    BudgetFigures,
    Manifest,
    MemberEntry,
    MixtureParity,
    QuantizationParity,
    SparseWeights,
    Weights,
)
from edgemix.bundle.stages import stage_key
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import RecipeError, storage_errors
from edgemix.export.budget.candidates import Trials
from edgemix.export.budget.check import verdict
from edgemix.export.budget.planner import Planner, decided, undecided
from edgemix.export.data.text import windows
from edgemix.export.distillation.distill import default_device, make_student
from edgemix.export.distillation.teacher import teacher_in_export
from edgemix.export.drafting.draft_head import make_draft
from edgemix.export.drafting.ngrams import write_ngrams
from edgemix.export.graphs.decoder import MODEL_FILE
from edgemix.export.models import tokenizers
from edgemix.export.models.loading import load_tokenizer, versions
from edgemix.export.models.location import locate
from edgemix.export.models.tokenizers import tokenizer_size
from edgemix.export.parity.against_fp32 import check_quantized, own_texts
from edgemix.export.parity.limits import enforce, within
from edgemix.export.parity.mixture import MIXTURE_TOKENS, compare_mixtures, keep_distributions
from edgemix.export.pruning.packing import pack_weights
from edgemix.export.quantization import quantize
from edgemix.export.quantization.graph.key_value import cache_scales
from edgemix.export.stages.blocks import MemberBlocks
from edgemix.export.stages.graphs import GATE_TOKENS, GraphRecord, MemberGraphs
from edgemix.export.stages.models import MemberModels
from edgemix.export.stages.shared_base import MemberStacks, groups
from edgemix.export.stages.weights import choose_adaptive, fit_weights, given_weights
from edgemix.progress import NO_PROGRESS, PrefixedProgress, Progress
from edgemix.recipe.load import check
from edgemix.recipe.schema import MemberRecipe
from edgemix.recipe.text_sources import read_documents
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from edgemix.export.budget.plan import Budget
    from edgemix.recipe.compression import Student
    from edgemix.recipe.schema import Recipe


class _MemberRecord(msgspec.Struct, frozen=True):
    """What the format stage found: the graph that the bundle holds, and how far it is from the fp32 one."""

    graph: GraphRecord
    config: GraphConfig
    parity: QuantizationParity | None
    sparse: SparseWeights | None = None
    eight_bits: float = 0.0
    place: str | None = None
    """The folder in the bundle of a graph that several members share; None for a graph of its own."""


def export_bundle(
    recipe: Recipe, output: Path, *, force: bool = False, budget: Budget | None = None, progress: Progress = NO_PROGRESS
) -> Manifest:
    """Build the bundle that `recipe` describes.

    Args:
        recipe: What to build; from `load_recipe`, or made in Python.
        output: The bundle's folder. A bundle that is there already is replaced, in one step, when the new one is whole.
        force: Let a format pass that is over its parity limits; the manifest says so.
        budget: Within which formats are chosen for the members that have none of their own, layer by layer.
        progress: Hears of every stage.

    Raises:
        RecipeError: The recipe has mistakes.
        InputError: A member cannot be read, the members do not share one tokenizer, or no choice is within the budget.
        ParityError: A graph is further from its source than its format allows.
        EdgemixError: A model type that no exporter knows, a full disk, a bundle that is over its budget after all.
    """
    if problems := check(recipe):
        raise RecipeError("\n".join(["the recipe has mistakes:", *problems]))
    with BundleWriter(output) as writer:
        return _Export(recipe, writer, force, progress).run(budget)


class _Export:
    """One export under way."""

    def __init__(self, recipe: Recipe, writer: BundleWriter, force: bool, progress: Progress) -> None:
        self._writer, self._force, self._progress = writer, force, progress
        self._eight_bits: dict[str, tuple[str, ...]] = {}
        self._take(recipe)

    def _take(self, recipe: Recipe) -> None:
        writer, force, progress = self._writer, self._force, self._progress
        self._recipe, self._models = recipe, MemberModels(recipe, writer, force, progress)
        self._graphs = MemberGraphs(recipe, self._models, writer, force=force, progress=progress)
        self._blocks = MemberBlocks(recipe, self._models, writer, progress)
        self._stacks = MemberStacks(
            recipe, models=self._models, graphs=self._graphs, blocks=self._blocks, writer=writer, progress=progress
        )

    def run(self, budget: Budget | None) -> Manifest:
        kept = [spec for spec in self._recipe.members if spec.format is not None]
        if budget is not None:
            self._take(undecided(self._recipe))
        tokenizer = self._share_tokenizer()
        ngrams = write_ngrams(self._recipe, self._writer, tokenizer=tokenizer, progress=self._progress)
        text = self._gate_text(tokenizer)
        mixed = self._mixture_text(text, tokenizer_size(tokenizer))
        judge = None
        if budget is not None:
            entries = [self._entry(spec, self._export_member(spec, text, mixed)) for spec in kept]
            judge = self._choose(budget, entries, tokenizer)
        recipe = self._recipe
        together, specs = groups(recipe, self._models), {spec.name: spec for spec in recipe.members}
        records = {name: record for group in together for name, record in self._export(group, text, mixed).items()}
        eos = {end for record in records.values() for end in record.graph.eos}
        manifest = Manifest(
            schema=SCHEMA,
            edgemix=edgemix.__version__,
            target=recipe.target,
            seed=recipe.seed,
            members=tuple(self._entry(specs[name], record) for name, record in records.items()),
            weights=given_weights(recipe),
            tokenizer=tokenizers.describe(tokenizer, eos),
            files={},
            versions=versions(),
        )
        if recipe.fits_weights:
            manifest = msgspec.structs.replace(manifest, weights=self._fit(manifest))
        manifest = msgspec.structs.replace(manifest, quantization=self._mixture_parity(manifest, mixed))
        if recipe.student is not None:
            made = self._student(recipe.student, manifest, text, tokenizer)
            manifest = msgspec.structs.replace(manifest, student=made)
        manifest = msgspec.structs.replace(manifest, ngrams=ngrams)
        if judge is not None:
            manifest = msgspec.structs.replace(manifest, budget=judge(manifest))
        return self._writer.finish(manifest, self._progress)

    def _choose(
        self, budget: Budget, kept: Sequence[MemberEntry], tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[Manifest], BudgetFigures]:
        """Find formats for the other members and go on with them; what will judge the bundle."""
        recipe, models, writer, progress = self._recipe, self._models, self._writer, self._progress
        trials = Trials(
            recipe, models=models, graphs=self._graphs, blocks=self._blocks, writer=writer, progress=progress
        )
        planner = Planner(recipe, kept, tokenizer, models=models, trials=trials, writer=writer, progress=progress)
        found = planner.plan(budget)
        self._take(decided(recipe, found))
        self._eight_bits = {member.name: member.eight_bits for member in found.members if member.eight_bits}
        judge = partial(verdict, budget=budget, found=found, folder=writer.folder, prompt=planner.prompt)
        return partial(judge, forced=self._force, progress=progress)

    def _share_tokenizer(self) -> PreTrainedTokenizerBase:
        """Read every member's tokenizer, make sure that they are one, and put its files in the bundle."""
        members = self._recipe.members
        with self._progress.stage("compare tokenizers", len(members)) as task:
            read = cache(load_tokenizer)
            found = {}
            for spec in members:
                found[spec.name] = read(locate(spec.model, self._recipe.folder))
                task.advance(note=spec.name)
            tokenizers.check_shared(found)
        tokenizer = found[members[0].name]
        tokenizers.save(tokenizer, self._writer.folder)
        return tokenizer

    def _gate_text(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
        """Windows of calibration text (of validation text where there is none), the same amount from every domain."""
        data = self._recipe.data
        sources = data.calibration or data.validation
        if not sources:
            return None
        share = max(2, GATE_TOKENS // len(sources))
        return [
            window
            for source in sources.values()
            for window in windows(read_documents(source, self._recipe.folder), tokenizer, data.window, max_tokens=share)
        ]

    def _mixture_text(self, gate_text: list[list[int]] | None, vocabulary: int) -> list[list[int]]:
        """What the mixture is compared with that of its fp32 graphs on: a piece of every window of the gates' text, and
        where that is little, what the first member's fp32 graph writes. Empty where there is nothing to compare.
        """
        recipe = self._recipe
        if len(recipe.members) == 1 or all(self._models.format(spec) == "fp32" for spec in recipe.members):
            return []
        windows = gate_text or []
        share = max(2, MIXTURE_TOKENS // max(1, len(windows)))
        texts = [window[:share] for window in windows]
        return texts if sum(map(len, texts)) >= MIXTURE_TOKENS // 2 else texts + self._own_text(vocabulary)

    def _own_text(self, vocabulary: int) -> list[list[int]]:
        spec, stages, seed = self._recipe.members[0], self._writer.stages, self._recipe.seed
        key = stage_key(graph=self._graphs.key(spec), vocabulary=vocabulary, seed=seed)
        text = stages.done("text", key, list[list[int]])
        if text is None:
            config, path = self._graphs.make(spec).config, self._graphs.path(spec)
            text = own_texts(path, config, MIXTURE_TOKENS // 2, seed=seed, vocabulary=vocabulary)
            stages.mark_done("text", key, text)
        return text

    def _export(
        self, whole: tuple[MemberRecipe, ...], text: list[list[int]] | None, mixed: list[list[int]]
    ) -> dict[str, _MemberRecord]:
        """The stages of members that may share a graph: those that can as one, each of the others for itself."""
        records: dict[str, _MemberRecord] = {}
        group = whole
        while len(group) > 1:
            records = self._export_stack(group, text, mixed)
            failing = {name for name, record in records.items() if record.parity and not within(record.parity)}
            if not failing or self._force:
                break
            self._progress.log(f"{', '.join(sorted(failing))}: a graph of its own, as one for all would lose too much")
            shutil.rmtree(self._writer.folder / self._stacks.place(group))
            group, records = tuple(spec for spec in group if spec.name not in failing), {}
        own = [spec for spec in whole if spec.name not in records]
        return records | {spec.name: self._export_member(spec, text, mixed) for spec in own}

    def _export_stack(
        self, group: tuple[MemberRecipe, ...], text: list[list[int]] | None, mixed: list[list[int]]
    ) -> dict[str, _MemberRecord]:
        """A graph for several members; nothing where they cannot share one."""
        stages, name = self._writer.stages, "+".join(spec.name for spec in group)
        place = self._stacks.place(group)
        key = stage_key(graph=self._stacks.key(group), text=text, mixed=mixed)
        records = stages.done(f"stack/{name}", key, dict[str, _MemberRecord])
        if records is None:
            folder = self._writer.folder / place
            made, records, files = self._stacks.make(group, folder / MODEL_FILE, text), {}, []
            if made is not None:
                files.append(folder)
                for spec in group:
                    graph, progress = self._graphs.make(spec), PrefixedProgress(self._progress, spec.name)
                    records[spec.name] = _MemberRecord(graph, made.config, made.parity[spec.name], place=place)
                    if mixed:
                        files.append(self._kept(spec))
                        master = self._graphs.path(spec)
                        keep_distributions(master, graph.config, mixed, self._kept(spec), progress=progress)
            stages.mark_done(f"stack/{name}", key, records, files=files)
            for spec in group if records else ():
                self._graphs.discard(spec)
        return records

    def _export_member(self, spec: MemberRecipe, text: list[list[int]] | None, mixed: list[list[int]]) -> _MemberRecord:
        """The stages of one member: load and merge, graph, format; the last finished one is where it goes on."""
        folder, master, stages = self._writer.folder / _place(spec), self._graphs.path(spec), self._writer.stages
        key = stage_key(
            graph=self._graphs.key(spec),
            format=self._models.format(spec),
            quantization=self._models.quantization(spec) if self._models.format(spec) in ("int4", "int8") else None,
            cache=self._recipe.cache,
            eight_bits=self._eight_bits.get(spec.name),
            data=self._models.data_digest(),
            text=text,
            mixed=mixed,
            seed=self._recipe.seed,
        )
        record = stages.done(f"member/{spec.name}", key, _MemberRecord)
        if record is None:
            graph = self._graphs.make(spec)
            record = self._make_format(spec, graph, folder, text)
            files = [folder]
            if mixed and record.parity is not None:
                files.append(self._kept(spec))
                progress = PrefixedProgress(self._progress, spec.name)
                keep_distributions(master, graph.config, mixed, self._kept(spec), progress=progress)
            if graph.sparse:
                sparse = pack_weights(folder / MODEL_FILE, PrefixedProgress(self._progress, spec.name))
                record = msgspec.structs.replace(record, sparse=sparse)
            stages.mark_done(f"member/{spec.name}", key, record, files=files)
            self._graphs.discard(spec)
        return record

    def _kept(self, spec: MemberRecipe) -> Path:
        """Where the distributions of a member's fp32 graph are kept."""
        return self._writer.scratch / f"{spec.name}.distributions.safetensors"

    def _make_format(
        self, spec: MemberRecipe, graph: GraphRecord, folder: Path, text: list[list[int]] | None
    ) -> _MemberRecord:
        form, source, output = self._models.format(spec), self._graphs.path(spec), folder / MODEL_FILE
        progress = PrefixedProgress(self._progress, spec.name)
        shutil.rmtree(folder, ignore_errors=True)
        quantization = self._models.quantization(spec)
        codes = self._recipe.cache == "int8"
        calibration = self._graphs.calibration(spec, form, needed=codes)
        scales = cache_scales(source, graph.config, calibration, progress=progress) if codes and calibration else None
        table = self._blocks.find(spec, self._eight_bits.get(spec.name))
        with progress.stage(form), storage_errors(f"writing {output}"):
            quantize(
                source,
                output,
                form,
                target=self._recipe.target,
                algorithm="hqq" if quantization.algorithm == "hqq" else "rtn",
                group=quantization.group,
                table=table,
                calibration=calibration,
                cache=scales,
                progress=progress,
            )
        half = self._recipe.target == "cuda" and form != "fp32"
        dtype, cache_dtype = "float16" if half else "float32", "int8" if codes else None
        config = msgspec.structs.replace(graph.config, dtype=dtype, cache_dtype=cache_dtype)
        if form == "fp32":
            return _MemberRecord(graph, config, None)
        mixed = table is not None and (self._eight_bits.get(spec.name) or quantization.eight_bits)
        eight_bits = table.share(8) if table is not None and mixed else 0.0
        seed = self._recipe.seed
        figures = check_quantized(source, output, config, text, format=form, seed=seed, progress=progress)
        return _MemberRecord(graph, config, figures, eight_bits=eight_bits)

    def _entry(self, spec: MemberRecipe, record: _MemberRecord) -> MemberEntry:
        """The manifest's word on a member, once its format has passed or was forced through the gate."""
        graph, figures = record.graph, record.parity
        gates = [gate for gate in (graph.pruning, graph.parity, figures) if gate is not None]
        verdicts = [enforce(gate, forced=self._force, member=spec.name) for gate in gates]
        forced = any(verdicts)
        if forced:
            self._progress.log(f"{spec.name}: over its parity limits, kept because the export is forced")
        return MemberEntry(
            name=spec.name,
            format=self._models.format(spec),
            graph=f"{record.place or _place(spec)}/{MODEL_FILE}",
            source=graph.source,
            config=record.config,
            parity=graph.parity,
            quantization=figures,
            fallbacks=graph.fallbacks,
            forced=forced,
            pruning=graph.pruning,
            sparse=record.sparse,
            eight_bits=record.eight_bits,
        )

    def _fit(self, manifest: Manifest) -> Weights:
        """Weights fitted on the recipe's validation text, with the graphs as they ship."""
        data, folder = self._recipe.data, self._recipe.folder
        domains = {domain: read_documents(source, folder) for domain, source in data.validation.items()}
        key = stage_key(manifest=manifest, domains=domains, window=data.window, max_tokens=data.max_tokens)
        weights = self._writer.stages.done("weights", key, Weights)
        if weights is None:
            with Mixture.assemble(self._writer.folder, manifest) as mixture:
                weights = fit_weights(
                    mixture, domains, window=data.window, max_tokens=data.max_tokens, progress=self._progress
                )
            self._writer.stages.mark_done("weights", key, weights)
        return choose_adaptive(weights, self._recipe.weights)

    def _mixture_parity(self, manifest: Manifest, texts: list[list[int]]) -> MixtureParity | None:
        """What quantisation costs the mixture, with its weights and its graphs as they ship."""
        if not texts:
            return None
        key = stage_key(members=manifest.members, weights=manifest.weights.default, texts=texts)
        figures = self._writer.stages.done("mixture", key, MixtureParity)
        if figures is None:
            kept = {spec.name: self._kept(spec) for spec in self._recipe.members if self._models.format(spec) != "fp32"}
            with Mixture.assemble(self._writer.folder, manifest) as mixture:
                figures = compare_mixtures(mixture, kept, texts, progress=self._progress)
            self._writer.stages.mark_done("mixture", key, figures)
        return figures

    def _student(
        self,
        student: Student,
        manifest: Manifest,
        text: list[list[int]] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> MemberEntry:
        """Distil the mixture with its weights; then a graph is made as for any member, and one to draft with."""
        folder, weights = self._writer.scratch / "distillation", manifest.weights.default
        specs = {spec.name: spec for spec in self._recipe.members}
        with Mixture.assemble(self._writer.folder, manifest) as mixture:
            teacher = teacher_in_export(mixture, weights, lambda name: self._models.load(specs[name]), default_device())
            model = make_student(self._recipe, weights, teacher, folder, self._progress)
        spec = MemberRecipe(STUDENT, str(model), format=student.format)
        entry = self._entry(spec, self._export_member(spec, text, []))
        licenses = {member.source.license for member in manifest.members}
        license_id = None if None in licenses else ", ".join(sorted(filter(None, licenses)))
        source = msgspec.structs.replace(entry.source, model="distilled from the mixture", license=license_id)
        place, known = self._writer.folder / _place(spec), manifest.tokenizer
        draft = make_draft(self._recipe, entry, place, tokenizer=tokenizer, known=known, progress=self._progress)
        return msgspec.structs.replace(entry, source=source, draft=draft)


def _place(spec: MemberRecipe) -> str:
    """The folder in the bundle of a member's graph, or of the student's."""
    return STUDENT if spec.name == STUDENT else f"members/{spec.name}"
