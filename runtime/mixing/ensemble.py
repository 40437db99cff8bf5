"""Which members a mixture evaluates, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.mixing.adaptive import AdaptivePrior
from edgemix.runtime.mixing.arithmetic import check_combine, normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.manifest import Manifest, Weights
    from edgemix.runtime.graphs.decoder import DecoderGraph
    from edgemix.runtime.mixing.arithmetic import Combine


WeightChoice = Mapping[str, float] | str | None
"""The weights of one call: member name -> number (normalized; a missing name weighs nothing), the name of one of the
bundle's domains, "adaptive" for weights that follow the text (see `adaptive`), "fixed" for the bundle's own weights at
every token, or None for what the bundle says: adaptive where its weights were fitted on several domains, else fixed."""

ADAPTIVE = "adaptive"
"""The choice of weights that follow the text."""
FIXED = "fixed"
"""The choice of the bundle's own weights, the same at every token."""


class ActiveGraph(NamedTuple):
    """A graph, and those of its members whose weight is above zero.

    Attributes:
        graph: The graph, of one or several members.
        local_indices: Their indices among the graph's members.
        ensemble_indices: Their indices among all active members of the ensemble.
    """

    graph: DecoderGraph
    local_indices: tuple[int, ...]
    ensemble_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Members, their weights, and how their distributions are mixed.

    Attributes:
        graphs: Graphs that hold the members, in order; a graph may hold several.
        weights: float64 [members], sum one; where they follow the text, those before any text.
        combine: See `arithmetic`.
        vocabulary: Number of token ids that are mixed; logits beyond them are cut off.
        prior: What adaptive weights choose among; None for fixed weights.
    """

    graphs: tuple[DecoderGraph, ...]
    weights: NDArray[np.float64]
    combine: Combine
    vocabulary: int
    prior: AdaptivePrior | None = None

    @classmethod
    def of(
        cls,
        graphs: Sequence[DecoderGraph],
        weights: NDArray[np.float64],
        combine: Combine,
        vocabulary: int,
        prior: AdaptivePrior | None = None,
    ) -> Ensemble:
        """Return the ensemble without graphs all of whose members have weight zero.

        Args:
            graphs: All graphs.
            weights: float64 [members of all graphs].
            combine: See `arithmetic`.
            vocabulary: Size of the tokenizer's vocabulary.
            prior: Over the members of all graphs.
        """
        starts = np.cumsum([0, *(graph.member_count for graph in graphs)])
        spans = [range(first, end) for first, end in pairwise(starts.tolist())]
        active = [(graph, span) for graph, span in zip(graphs, spans, strict=True) if weights[list(span)].any()]
        kept = np.array([member for _, span in active for member in span], np.int64)
        narrowed = prior.narrowed(kept) if prior else None
        return cls(tuple(graph for graph, _ in active), weights[kept], combine, vocabulary, narrowed)

    @property
    def active(self) -> NDArray[np.int64]:
        """Indices of the members whose weight is above zero."""
        return np.flatnonzero(self.weights)

    def active_graphs(self) -> list[ActiveGraph]:
        """Return every graph with its active members; their `ensemble_indices` are positions in `active`."""
        found, first, index = [], 0, 0
        for graph in self.graphs:
            local = tuple(np.flatnonzero(self.weights[first : first + graph.member_count]).tolist())
            found.append(ActiveGraph(graph, local, tuple(range(index, index + len(local)))))
            first, index = first + graph.member_count, index + len(local)
        return found


@dataclass(frozen=True, slots=True)
class WeightResolver:
    """Resolves the weights that a call names to an ensemble.

    Attributes:
        names: The members' names, in the manifest's order.
        weights: The bundle's weights.
        vocabulary: Size of the tokenizer's vocabulary.
    """

    names: tuple[str, ...]
    weights: Weights
    vocabulary: int

    @classmethod
    def of(cls, manifest: Manifest) -> WeightResolver:
        """Return the resolver of a bundle."""
        names = tuple(entry.name for entry in manifest.members)
        return cls(names, manifest.weights, manifest.vocabulary)

    def full_ensemble(self, graphs: Sequence[DecoderGraph], weights: WeightChoice, combine: Combine) -> Ensemble:
        """Return the ensemble of all members, those of weight zero included.

        Raises:
            InputError: The weights are none of this bundle's, or do not go with `combine`.
        """
        check_combine(combine)
        prior = self.prior(combine) if self.resolve(weights, combine) == ADAPTIVE else None
        shares = prior.weights if prior else self.fixed_weights(weights)
        return Ensemble(tuple(graphs), shares, combine, self.vocabulary, prior)

    def ensemble(self, graphs: Sequence[DecoderGraph], weights: WeightChoice, combine: Combine) -> Ensemble:
        """Return the ensemble of the graphs that have an active member; raises as `full_ensemble`."""
        full = self.full_ensemble(graphs, weights, combine)
        return Ensemble.of(full.graphs, full.weights, combine, self.vocabulary, full.prior)

    def resolve(self, weights: WeightChoice, combine: Combine = "linear") -> WeightChoice:
        """Return the choice that None stands for: adaptive weights where the bundle's are, as far as the mixture is
        linear, else fixed ones. Any other choice is returned as it is.
        """
        if weights is not None:
            return weights
        return ADAPTIVE if self.weights.adaptive and combine == "linear" else FIXED

    def prior(self, combine: Combine) -> AdaptivePrior:
        """Return what adaptive weights choose among.

        Raises:
            InputError: The mixture is not linear.
        """
        if combine != "linear":
            raise InputError(
                f'weights="{ADAPTIVE}" are those of the linear mixture, not of {combine!r}',
                'Leave combine out, or choose combine="linear".',
            )
        return AdaptivePrior.of(self.names, self.weights.default, self.weights.domains)

    def fixed_weights(self, weights: WeightChoice) -> NDArray[np.float64]:
        """Return float64 [members], sum one, of weights that do not follow the text.

        Raises:
            InputError: They name a domain or a member that the bundle does not have, or are all zero.
        """
        domains = self.weights.domains
        if weights == FIXED and FIXED not in domains:
            weights = None
        if isinstance(weights, str):
            if weights not in domains:
                raise InputError(
                    f"this bundle has no weights for a domain {weights!r}",
                    f"Domains: {', '.join(domains)}." if domains else "It has no domains: give weights by member name.",
                )
            weights = domains[weights]
        return normalize(self.weights.default if weights is None else weights, self.names)
