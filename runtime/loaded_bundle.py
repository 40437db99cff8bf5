"""The loaded graphs of a bundle, and the ensembles made of them: the base of `Mixture`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime.mixing.ensemble import Ensemble, WeightResolver
from edgemix.runtime.sequences.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.bundle.manifest import Manifest
    from edgemix.bundle.ngram_table import NgramTable
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.graphs.providers import Provider
    from edgemix.runtime.machine.plan import RuntimePlan
    from edgemix.runtime.mixing.arithmetic import Combine
    from edgemix.runtime.mixing.ensemble import WeightChoice
    from edgemix.runtime.text.tokenizer import Tokenizer

_ELSEWHERE: list[object] = []
"""Graphs of the parent process: freeing them after a fork would wait for threads that this process does not have."""


class LoadedBundle:
    """The loaded graphs of a bundle; `Mixture` documents the attributes."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Sequence[DecoderGraph],
        tokenizer: Tokenizer,
        provider: Provider,
        *,
        drafter: DecoderGraph | None = None,
        ngrams: NgramTable | None = None,
        prefix_bytes: int = 0,
        plan: RuntimePlan | None = None,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.members = tuple(entry.name for entry in manifest.members)
        self.weights: Mapping[str, float] = dict(manifest.weights.default)
        self.vocabulary = manifest.vocabulary
        self.context = min(graph.context for graph in graphs)
        self.provider = provider.name
        self._weight_resolver = WeightResolver.of(manifest)
        self._process = os.getpid()
        self.plan = plan
        self._loaded = tuple(graphs)
        self._drafter, self.ngrams = drafter, ngrams
        self.prefixes = PrefixCache(prefix_bytes)

    def close(self) -> None:
        """Free the graphs; the mixture cannot be used afterwards."""
        if self._process != os.getpid():
            _ELSEWHERE.append((self._loaded, self._drafter))
        self._loaded, self._drafter = (), None
        self.prefixes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def drafting(self) -> Ensemble | None:
        """The student as an ensemble of one, where it was loaded beside the members; else None."""
        return None if self._drafter is None else Ensemble((self._drafter,), np.ones(1), "linear", self.vocabulary)

    def ensemble(self, weights: WeightChoice = None, combine: Combine = "linear") -> Ensemble:
        """Return the members with a weight above zero, and how they are mixed.

        Args:
            weights: See `WeightChoice`.
            combine: How the members' distributions are mixed.

        Raises:
            InputError: The weights are none of this bundle's, or do not go with `combine`.
        """
        return self._weight_resolver.ensemble(self.graphs(), weights, combine)

    def full_ensemble(self, weights: WeightChoice = None, combine: Combine = "linear") -> Ensemble:
        """Return the same with all members, those of weight zero included."""
        return self._weight_resolver.full_ensemble(self.graphs(), weights, combine)

    def resolve_weights(self, weights: WeightChoice = None, combine: Combine = "linear") -> WeightChoice:
        """Return the weights that a call uses: for None, "adaptive" or "fixed" as the bundle says."""
        return self._weight_resolver.resolve(weights, combine)

    @property
    def longest_text(self) -> int:
        """Characters that no text of as many tokens as the context has, normalization included."""
        return 1024 + 4 * self.context * self.tokenizer.longest_token

    def encode_prompt(self, text: str, what: str = "the prompt") -> list[int]:
        """Return the token ids of a text that must be within the context.

        Raises:
            InputError: It is longer, which is found out before much of it is tokenized, or cannot be encoded.
        """
        if len(text) > self.longest_text:
            raise InputError(
                f"{what} has {len(text):,} characters, more than the context of {self.context} tokens holds",
                "Shorten it.",
            )
        ids = self.tokenizer.encode(text)
        self.check_length(ids, what)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a conversation; see `Tokenizer.render`."""
        return self.tokenizer.render(messages, longest=self.longest_text, **options)

    def check_length(self, ids: Sequence[int], what: str) -> None:
        """Raise InputError if there are more token ids than the context allows."""
        if len(ids) > self.context:
            raise InputError(f"{what} has {len(ids)} tokens, more than the context of {self.context}", "Shorten it.")

    def graphs(self) -> tuple[DecoderGraph, ...]:
        """Return the members' graphs.

        Raises:
            EdgemixError: The mixture is closed, or belongs to the process that this one was forked from: ONNX Runtime's
                threads stayed there.
        """
        if not self._loaded:
            raise EdgemixError("this mixture is closed", "Load the bundle again.")
        if self._process != os.getpid():
            raise EdgemixError(
                "this mixture was loaded before the process forked, and its threads stayed in the other one",
                'Load it after the fork, or start processes with multiprocessing\'s "spawn".',
            )
        return self._loaded
