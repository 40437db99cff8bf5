"""The tokenizer that all members share, and the texts on which graphs are measured."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from edgemix.bundle.stages import stage_key
from edgemix.export.data.text import windows
from edgemix.export.models import tokenizers
from edgemix.export.models.loading import load_tokenizer, member_tokenizer
from edgemix.export.parity.against_fp32 import sample_texts
from edgemix.export.parity.mixture import MIXTURE_TOKENS
from edgemix.export.stages.graphs import GATE_TOKENS
from edgemix.formats import FORMAT_SPECS
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgemix.export.context import ExportContext
    from edgemix.export.stages.graphs import MemberGraphs
    from edgemix.export.stages.models import MemberModels


def share_tokenizer(context: ExportContext) -> PreTrainedTokenizerBase:
    """Read every member's tokenizer, check that they are equal, and write its files to the bundle.

    Raises:
        InputError: A tokenizer cannot be read, or two of them differ.
    """
    members = context.recipe.members
    with context.progress.stage("compare tokenizers", len(members)) as task:
        read = cache(load_tokenizer)
        found = {}
        for spec in members:
            found[spec.name] = member_tokenizer(spec, context.recipe.folder, read)
            task.advance(note=spec.name)
        tokenizers.check_shared(found)
    tokenizer = found[members[0].name]
    template = tokenizers.chat_template(tokenizer)
    if others := [name for name, each in found.items() if tokenizers.chat_template(each) != template]:
        context.progress.log(
            f"{', '.join(others)}: other chat templates than {members[0].name}'s, which the bundle has"
        )
    tokenizers.save(tokenizer, context.writer.folder)
    return tokenizer


def gate_texts(context: ExportContext, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """Return chunks of calibration text (of validation text if there is none), equally many tokens of every domain."""
    data = context.recipe.data
    sources = data.calibration or data.validation
    if not sources:
        return None
    share = max(2, GATE_TOKENS // len(sources))
    return [
        chunk
        for source in sources.values()
        for chunk in windows(read_documents(source, context.recipe.folder), tokenizer, data.window, max_tokens=share)
    ]


def mixture_texts(
    context: ExportContext,
    models: MemberModels,
    graphs: MemberGraphs,
    texts: list[list[int]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Return the texts on which the mixture is compared with that of its fp32 graphs.

    They are the beginnings of the gate's texts and, where those are short, texts sampled from the first member's fp32
    graph. Empty where there is nothing to compare: one member, or fp32 members only.
    """
    recipe = context.recipe
    if len(recipe.members) == 1 or all(FORMAT_SPECS[models.format(spec)].reference for spec in recipe.members):
        return []
    share = max(2, MIXTURE_TOKENS // max(1, len(texts or [])))
    found = [text[:share] for text in texts or []]
    if sum(map(len, found)) >= MIXTURE_TOKENS // 2:
        return found
    return found + _sampled_texts(context, graphs, tokenizers.trained_size(tokenizer))


def _sampled_texts(context: ExportContext, graphs: MemberGraphs, vocabulary: int) -> list[list[int]]:
    spec, seed = context.recipe.members[0], context.recipe.seed

    def make() -> list[list[int]]:
        config = graphs.make(spec).config
        return sample_texts(graphs.path(spec), config, MIXTURE_TOKENS // 2, seed=seed, vocabulary=vocabulary)

    key = stage_key(graph=graphs.key(spec), vocabulary=vocabulary, seed=seed)
    return context.stage("text", key, make, list[list[int]])
