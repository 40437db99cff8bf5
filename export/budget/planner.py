"""From a recipe to a plan: graphs that are made and measured, losses that are estimated, and the choice.

Where time is limited the choice is checked: its graphs are made by rounding and run together, before anything takes
long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.manifest import NGRAMS, SCHEMA, TOKENIZER, GraphParity, Manifest, MemberEntry, ModelSource
from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError
from edgemix.export.budget.costs import member_costs
from edgemix.export.budget.plan import Cost, FormatPlan, ResourceBudget, plan_formats
from edgemix.export.budget.speed import DecodingTimes, StoredGraph, decoding_times
from edgemix.export.budget.student_size import draft_bytes, student_bytes
from edgemix.export.distillation.student import Shape, expected_shape, start_member
from edgemix.export.models import tokenizers
from edgemix.export.models.loading import versions
from edgemix.export.stages.weights import fit_weights, given_weights
from edgemix.formats import BLOCK_FORMATS, FORMAT_SPECS, MIXED_BITS, Format, candidate_formats
from edgemix.progress import PrefixedProgress
from edgemix.recipe.text_sources import read_documents
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from edgemix.export.budget.candidates import CandidateGraphs, MeasuredMember
    from edgemix.export.context import ExportContext
    from edgemix.export.stages.models import MemberModels
    from edgemix.recipe.schema import MemberRecipe, Recipe

_MANIFEST = 2_200
"""About the bytes of a manifest, and of each member in it."""
_SLACK = 1e-3
"""Share of the bytes that is left alone: what tensors are aligned by."""
_RESERVE = 600
"""Bytes a member that are left alone: 8-bit codes may need a node more, or a tensor in the file beside the graph."""
_MAX_CORRECTIONS = 3
_PROMPT = 64


def with_initial_formats(recipe: Recipe) -> Recipe:
    """Return the recipe with int4, as a beginning, for all members that have no format of their own.

    Raises:
        InputError: Every member has a format, a member's algorithm or settings leave no choice of bits, members share
            graphs, or the cache is kept in 8 bits.
    """
    if recipe.stack:
        raise InputError(
            "a budget chooses formats member by member, and stacked members have one graph",
            "Leave stack: true out of the recipe, or export without a budget.",
        )
    if recipe.cache == "int8":
        raise InputError(
            "a budget does not go with cache: int8, as formats are tried with keys and values in float",
            "Leave one of them out.",
        )
    chosen = [spec for spec in recipe.members if spec.format is None]
    if not chosen:
        raise InputError(
            "every member of the recipe has a format of its own: a budget has nothing to choose",
            "Take format: away from some members.",
        )
    for spec in chosen:
        quantization, what = spec.quantization or recipe.quantization, f"member {spec.name}: a budget chooses bits"
        if quantization.algorithm in ("rtn", "hqq"):
            problem = f"{what} layer by layer, which algorithm {quantization.algorithm} cannot do"
            raise InputError(problem, "Take auto, learned-rounding or gptq.")
        if quantization.eight_bits:
            raise InputError(f"{what}, and so does eight_bits", "Leave out one of the two.")
    return _with_formats(recipe, {spec.name: MIXED_BITS for spec in chosen})


def with_planned_formats(recipe: Recipe, found: FormatPlan) -> Recipe:
    """Return the recipe with the formats of a plan."""
    return _with_formats(recipe, {member.name: member.format for member in found.members})


def _with_formats(recipe: Recipe, formats: Mapping[str, Format]) -> Recipe:
    members = [msgspec.structs.replace(spec, format=formats.get(spec.name, spec.format)) for spec in recipe.members]
    return msgspec.structs.replace(recipe, members=tuple(members))


class FormatPlanner:
    """Choose formats for those members of a recipe that have none of their own.

    Args:
        context: The export; the members to choose for have the format int4.
        kept: The other members, which are in the bundle already.
        tokenizer: The members' tokenizer.
        models: The members' models.
        candidates: The members' candidate graphs.
    """

    def __init__(
        self,
        context: ExportContext,
        kept: Sequence[MemberEntry],
        tokenizer: PreTrainedTokenizerBase,
        *,
        models: MemberModels,
        candidates: CandidateGraphs,
    ) -> None:
        self._context, self._recipe, self._writer = context, context.recipe, context.writer
        self._tokenizer, self._models, self._candidates = tokenizer, models, candidates
        self._kept = {entry.name: entry for entry in kept}
        self._chosen = [spec for spec in context.recipe.members if spec.name not in self._kept]

    @property
    def prompt(self) -> list[int]:
        """Token ids that time is measured after."""
        return self._models.calibration(self._tokenizer, "prompt", _PROMPT, 1)[0]

    def plan(self, budget: ResourceBudget) -> FormatPlan:
        """Choose formats; the stored plan is returned if its inputs are the same.

        Raises:
            InputError: The recipe has no text, a member cannot be read, or nothing is within the budget.
            EdgemixError: Time cannot be measured here.
        """
        if not self._models.has_text():
            raise InputError(
                "a budget (--budget, --max-tpot) needs text", "Name some under data: calibration: in the recipe."
            )
        recipe = self._recipe
        key = stage_key(
            members=self._key(),
            quantization=recipe.quantization,
            weights=recipe.weights,
            student=recipe.student,
            common=self._common_bytes(),
            text=(self._models.data_digest(), self._validation()),
            budget=budget,
        )
        found = self._context.stage("plan", key, lambda: self._make(budget), FormatPlan)
        self._candidates.remove()
        return found

    def _key(self) -> str:
        """Return the cache key of the members' graphs, for all stages."""
        members = [(spec, self._models.key(spec)) for spec in self._recipe.members]
        rest = {"target": self._recipe.target, "versions": versions(), "seed": self._recipe.seed}
        return stage_key(members=members, kept=list(self._kept.values()), **rest)

    def _make(self, budget: ResourceBudget) -> FormatPlan:
        measured = {spec.name: self._candidates.measure(spec) for spec in self._chosen}
        weights = self._weights(measured)
        times = self._times(measured, weights) if budget.seconds is not None else {}
        found, scale = self._plan_formats(budget, measured, weights, times), 1.0
        for _ in range(_MAX_CORRECTIONS if budget.seconds is not None else 0):
            taken = self._measure_choice(found, measured, weights)
            if taken <= (budget.seconds or 0):
                break
            scale *= taken / found.cost.seconds
            scaled = {
                name: {weight_format: scale * time for weight_format, time in each.items()}
                for name, each in times.items()
            }
            found = self._plan_formats(budget, measured, weights, scaled)
        return found

    def _plan_formats(
        self,
        budget: ResourceBudget,
        measured: Mapping[str, MeasuredMember],
        weights: Mapping[str, float],
        times: Mapping[str, Mapping[Format, float]],
    ) -> FormatPlan:
        members = []
        for spec in self._chosen:
            of, time = measured[spec.name], times.get(spec.name, {})
            members.append(
                member_costs(
                    spec.name,
                    weights[spec.name],
                    {
                        weight_format: Cost(size, time.get(weight_format, 0.0))
                        for weight_format, size in of.bytes.items()
                    },
                    groups=of.groups,
                    shapes=of.shapes,
                    losses=of.losses,
                    block=self._models.quantization(spec).group,
                    sparse=of.sparse,
                )
            )
        left = None if budget.bytes is None else int(budget.bytes * (1 - _SLACK)) - _RESERVE * len(self._recipe.members)
        room = ResourceBudget(left, budget.seconds)
        shared = Cost(
            self._common_bytes() + _MANIFEST * (1 + len(self._recipe.members)) + self._size(self._kept.values()),
            sum(time for name in self._kept for time in times.get(name, {}).values()),
        )
        if self._recipe.student is None:
            return plan_formats(members, room, shared=shared)
        # How much is left of the student depends on the format of the member that it is cut from.
        start = start_member(self._recipe, weights)
        before: Format = self._models.format(start)
        found = plan_formats(members, room, shared=shared + Cost(self._student(start, weights, before, measured)))
        after = next((each.format for each in found.members if each.name == start.name), before)
        if after == before:
            return found
        return plan_formats(members, room, shared=shared + Cost(self._student(start, weights, after, measured)))

    def _student(
        self,
        start: MemberRecipe,
        weights: Mapping[str, float],
        start_format: Format,
        measured: Mapping[str, MeasuredMember],
    ) -> int:
        """Estimate the bytes of the student's graphs, if the member that it is cut from has this format."""
        student = self._recipe.student
        if student is None:
            return 0
        shape = expected_shape(self._recipe, weights, self._tokenizer, start_format)
        member = Shape.of(self._models.load(start).model)
        own = self._models.format(start)
        size = measured[start.name].bytes[own] if start.name in measured else self._size([self._kept[start.name]])
        group = self._models.quantization(start).group
        whole = student_bytes(shape, student.format, member, size, own, group=group)
        return whole + draft_bytes(shape, student.format, tokenizers.tokenizer_size(self._tokenizer))

    def _weights(self, measured: Mapping[str, MeasuredMember]) -> dict[str, float]:
        """Return the mixture's weights; fitted ones are those of the graphs in int8."""
        recipe = self._recipe
        if not recipe.fits_weights:
            return given_weights(recipe).default
        domains = self._validation()
        window, most = recipe.data.window, recipe.data.max_tokens
        key = stage_key(members=self._key(), domains=domains, window=window, max_tokens=most)

        def make() -> dict[str, float]:
            with self._mixture(measured) as mixture:
                progress = self._context.progress
                return fit_weights(mixture, domains, window=window, max_tokens=most, progress=progress).default

        return self._context.stage("candidates/weights", key, make, dict[str, float])

    def _mixture(self, measured: Mapping[str, MeasuredMember]) -> Mixture:
        """Open the mixture of the members in int8."""
        graphs = self._graphs(measured, BLOCK_FORMATS[8])
        root = self._writer.scratch.parent
        none = ModelSource("", "", 0, ""), GraphParity(0, 0, 0, 0)
        manifest = Manifest(
            schema=SCHEMA,
            edgemix="",
            target=self._recipe.target,
            seed=self._recipe.seed,
            members=tuple(
                MemberEntry(
                    name, BLOCK_FORMATS[8], graph.path.relative_to(root).as_posix(), none[0], graph.config, none[1]
                )
                for name, graph in graphs.items()
            ),
            weights=given_weights(msgspec.structs.replace(self._recipe, weights="uniform")),
            tokenizer=tokenizers.describe(self._tokenizer, set()),
            files={},
        )
        tokenizers.save(self._tokenizer, root)
        return Mixture.assemble(root, manifest)

    def _graphs(self, measured: Mapping[str, MeasuredMember], weight_format: Format) -> dict[str, StoredGraph]:
        """Return every member's graph: in this format, or the stored one of a member with a format of its own."""
        return {
            spec.name: StoredGraph(self._candidates.path(spec, weight_format), measured[spec.name].config)
            if spec.name in measured
            else self._as_kept(self._kept[spec.name])
            for spec in self._recipe.members
        }

    def _as_kept(self, entry: MemberEntry) -> StoredGraph:
        return StoredGraph(self._writer.folder / entry.graph, entry.config)

    def _times(
        self, measured: Mapping[str, MeasuredMember], weights: Mapping[str, float]
    ) -> dict[str, dict[Format, float]]:
        """Return the seconds that a token of the mixture takes each member with a weight above zero, by format."""
        active = [name for name in weights if weights[name] > 0]
        key, kind = stage_key(members=self._key(), active=active), dict[str, dict[Format, float]]
        return self._context.stage("candidates/times", key, lambda: self._measure_times(measured, active), kind)

    def _measure_times(
        self, measured: Mapping[str, MeasuredMember], active: Sequence[str]
    ) -> dict[str, dict[Format, float]]:
        found: dict[str, dict[Format, float]] = {name: {} for name in active}
        in_turns = 1.0
        for weight_format in candidate_formats(self._recipe.target):
            graphs = {name: graph for name, graph in self._graphs(measured, weight_format).items() if name in active}
            # CPUs widen floating-point weights: all members at once might not fit into memory.
            if FORMAT_SPECS[weight_format].floating_point:
                alone = {
                    name: self._time({name: graph}, weight_format).together
                    for name, graph in graphs.items()
                    if name in measured
                }
            else:
                alone, together = self._time(graphs, weight_format)
                # Members that take turns evict each other from the caches.
                in_turns = together / sum(alone.values())
            for name, time in alone.items():
                if name in measured or not found[name]:
                    found[name][weight_format] = time * in_turns
        return found

    def _measure_choice(
        self, found: FormatPlan, measured: Mapping[str, MeasuredMember], weights: Mapping[str, float]
    ) -> float:
        """Return the measured seconds per token of the mixture in the chosen formats."""
        graphs = {name: self._as_kept(entry) for name, entry in self._kept.items()}
        for spec, chosen in zip(self._chosen, found.members, strict=True):
            path = self._candidates.path(spec, chosen.format)
            if chosen.eight_bits and weights[spec.name] > 0:
                path = self._candidates.mix(spec, chosen.eight_bits)
            graphs[spec.name] = StoredGraph(path, measured[spec.name].config)
        return self._time({name: graph for name, graph in graphs.items() if weights[name] > 0}, "choice").together

    def _time(self, graphs: Mapping[str, StoredGraph], what: str) -> DecodingTimes:
        progress = PrefixedProgress(self._context.progress, what)
        return decoding_times(graphs, self.prompt, target=self._recipe.target, progress=progress)

    def _validation(self) -> dict[str, list[str]]:
        """Return the texts that weights are fitted on; empty if they are not."""
        if not self._recipe.fits_weights:
            return {}
        sources = self._recipe.data.validation
        return {domain: read_documents(each, self._recipe.folder) for domain, each in sources.items()}

    def _size(self, entries: Iterable[MemberEntry]) -> int:
        """Return the bytes of graphs that are in the bundle already."""
        folders = [(self._writer.folder / entry.graph).parent for entry in entries]
        return sum(path.stat().st_size for folder in folders for path in folder.iterdir())

    def _common_bytes(self) -> int:
        """Return the bytes of the tokenizer and the n-grams."""
        folder, ngrams = self._writer.folder, self._writer.folder / NGRAMS
        paths = [*(folder / TOKENIZER).parent.iterdir(), *([ngrams] if ngrams.exists() else [])]
        return sum(path.stat().st_size for path in paths)
