"""Stages on the mixture of the stored graphs: fit its weights, and measure the cost of quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.bundle.manifest import Manifest, MixtureParity, Weights
from edgemix.bundle.stages import stage_key
from edgemix.export.parity.mixture import compare_mixtures
from edgemix.export.stages.weights import choose_adaptive, fit_weights
from edgemix.recipe.text_sources import read_documents
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemix.export.context import ExportContext


def fitted_weights(context: ExportContext, manifest: Manifest) -> Weights:
    """Fit the weights on the recipe's validation text, with the stored graphs."""
    data, recipe = context.recipe.data, context.recipe
    domains = {domain: read_documents(source, recipe.folder) for domain, source in data.validation.items()}

    def make() -> Weights:
        with Mixture.assemble(context.writer.folder, manifest) as mixture:
            return fit_weights(
                mixture, domains, window=data.window, max_tokens=data.max_tokens, progress=context.progress
            )

    key = stage_key(manifest=manifest, domains=domains, window=data.window, max_tokens=data.max_tokens)
    return choose_adaptive(context.stage("weights", key, make, Weights), recipe.weights)


def mixture_parity(
    context: ExportContext, manifest: Manifest, texts: Sequence[Sequence[int]], distributions: Mapping[str, Path]
) -> MixtureParity | None:
    """Compare the mixture of the stored graphs with that of the fp32 graphs; None without texts.

    Args:
        context: The export.
        manifest: With the members and the final weights.
        texts: Token ids.
        distributions: Member name -> the file with its fp32 graph's distributions, but for fp32 members.
    """
    if not texts:
        return None

    def make() -> MixtureParity:
        with Mixture.assemble(context.writer.folder, manifest) as mixture:
            return compare_mixtures(mixture, distributions, texts, progress=context.progress)

    key = stage_key(members=manifest.members, weights=manifest.weights.default, texts=texts)
    return context.stage("mixture", key, make, MixtureParity)
