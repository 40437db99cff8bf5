"""Whether a bundle that was planned within a budget is within it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.manifest import NGRAMS, TOKENIZER, BudgetFigures, BudgetPoint, Manifest
from edgemix.errors import EdgemixError
from edgemix.export.budget.speed import StoredGraph, decoding_times

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemix.export.budget.plan import Cost, FormatPlan, ResourceBudget
    from edgemix.progress import Progress

NOISE = 0.05
"""Share by which the time of one measurement may be off."""
_FILE = 150
"""About the bytes that a manifest has on a file."""


def check_budget(
    manifest: Manifest,
    *,
    budget: ResourceBudget,
    found: FormatPlan,
    folder: Path,
    prompt: Sequence[int],
    forced: bool,
    progress: Progress,
) -> BudgetFigures:
    """Measure a bundle that is whole but for its checksums.

    Args:
        manifest: Of the bundle.
        budget: The limits.
        found: What was chosen.
        folder: Its files.
        prompt: Token ids to decode after.
        forced: Let it pass if it is over a limit.
        progress: Progress callback.

    Raises:
        EdgemixError: It is over a limit, time by more than `NOISE`.
    """
    measured = None
    if budget.seconds is not None:
        active = [entry for entry in manifest.members if manifest.weights.default[entry.name] > 0]
        graphs = {entry.name: StoredGraph(folder / entry.graph, entry.config) for entry in active}
        measured = decoding_times(graphs, prompt, target=manifest.target, progress=progress).together
    figures = BudgetFigures(
        bytes=budget.bytes,
        seconds=budget.seconds,
        chosen=_point(found.cost, budget),
        losses={member.name: member.cost.loss for member in found.members},
        curve=tuple(_point(cost, budget) for cost in found.curve),
        measured=measured,
    )
    problems = []
    size = bundle_bytes(msgspec.structs.replace(manifest, budget=figures), folder)
    if budget.bytes is not None and size > budget.bytes:
        problems.append(f"it has {size / 1e6:,.2f} MB, more than {budget.bytes / 1e6:,.2f}")
    if budget.seconds is not None and measured is not None and measured > (1 + NOISE) * budget.seconds:
        problems.append(
            f"a token takes {1000 * measured:,.2f} ms, more than {1000 * budget.seconds:,.2f} (by the plan "
            f"{1000 * found.cost.seconds:,.2f})"
        )
    if problems and not forced:
        remedy = "Run it again with a little less, on a machine that does nothing else; or with --force."
        raise EdgemixError(f"the bundle is not within its budget: {'; '.join(problems)}", remedy)
    for problem in problems:
        progress.log(f"not within its budget, kept because the export is forced: {problem}")
    return figures


def bundle_bytes(manifest: Manifest, folder: Path) -> int:
    """About the bytes of a bundle's folder once it is finished."""
    folders = [(folder / entry.graph).parent for entry in manifest.graphs]
    folders.append((folder / TOKENIZER).parent)
    files = [path for each in folders for path in each.iterdir()]
    files += [folder / NGRAMS] if manifest.ngrams else []
    sizes = [path.stat().st_size for path in files]
    return sum(sizes) + len(msgspec.json.encode(manifest)) + _FILE * len(sizes)


def _point(cost: Cost, budget: ResourceBudget) -> BudgetPoint:
    return BudgetPoint(cost.bytes, cost.seconds if budget.seconds is not None else None, cost.loss)
