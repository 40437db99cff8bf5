"""Which members speak, and how they are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgemix.errors import InputError
from edgemix.runtime.mixing.adaptive import Experts
from edgemix.runtime.mixing.arithmetic import check_combine, normalise
from edgemix.runtime.options import ADAPTIVE, FIXED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.manifest import Manifest, Weights
    from edgemix.runtime.graphs.decoder import Member
    from edgemix.runtime.mixing.arithmetic import Combine
    from edgemix.runtime.options import WeightChoice


class Listened(NamedTuple):
    """A graph, and those of its voices that weigh something.

    Attributes:
        own: Their numbers among the graph's voices.
        places: Their numbers among all voices that weigh something.
    """

    member: Member
    own: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blend:
    """Members and how they are mixed.

    Attributes:
        members: Graphs that speak for a member with a weight above zero; the others need not be evaluated.
        weights: float64 [voices of all of them], sum one; where they follow the text, those before any.
        combine: See `mixing`.
        vocabulary: The tokenizer's; logits beyond it are cut off.
        experts: What the weights follow the text by; None for weights that stay.
    """

    members: tuple[Member, ...]
    weights: NDArray[np.float64]
    combine: Combine
    vocabulary: int
    experts: Experts | None = None

    @classmethod
    def of(
        cls,
        members: Sequence[Member],
        weights: NDArray[np.float64],
        combine: Combine,
        vocabulary: int,
        experts: Experts | None = None,
    ) -> Blend:
        """The blend of those members that weigh something, from weights (and experts) of all members' voices."""
        starts = np.cumsum([0, *(member.voices for member in members)])
        spans = [range(first, end) for first, end in pairwise(starts.tolist())]
        heavy = [(member, span) for member, span in zip(members, spans, strict=True) if weights[list(span)].any()]
        kept = np.array([voice for _, span in heavy for voice in span], np.int64)
        narrowed = experts.narrowed(kept) if experts else None
        return cls(tuple(member for member, _ in heavy), weights[kept], combine, vocabulary, narrowed)

    @property
    def heavy(self) -> NDArray[np.int64]:
        """The voices that weigh something."""
        return np.flatnonzero(self.weights)

    def listened(self) -> list[Listened]:
        """Every graph with its voices that weigh something; their `places` are numbers in `heavy`."""
        found, first, place = [], 0, 0
        for member in self.members:
            own = tuple(np.flatnonzero(self.weights[first : first + member.voices]).tolist())
            found.append(Listened(member, own, tuple(range(place, place + len(own)))))
            first, place = first + member.voices, place + len(own)
        return found


@dataclass(frozen=True, slots=True)
class Blender:
    """Makes blends from what callers say of weights.

    Attributes:
        names: The members', in the manifest's order.
        weights: The bundle's.
        vocabulary: The tokenizer's.
    """

    names: tuple[str, ...]
    weights: Weights
    vocabulary: int

    @classmethod
    def of(cls, manifest: Manifest) -> Blender:
        """Those of a bundle."""
        names = tuple(entry.name for entry in manifest.members)
        return cls(names, manifest.weights, manifest.tokenizer.vocabulary)

    def whole(self, graphs: Sequence[Member], weights: WeightChoice, combine: Combine) -> Blend:
        """All members, those that weigh nothing too.

        Raises:
            InputError: An argument makes no sense.
        """
        check_combine(combine)
        experts = self.experts(combine) if self.resolve(weights, combine) == ADAPTIVE else None
        shares = experts.weights if experts else self.shares(weights)
        return Blend(tuple(graphs), shares, combine, self.vocabulary, experts)

    def blend(self, graphs: Sequence[Member], weights: WeightChoice, combine: Combine) -> Blend:
        """The members that weigh something; raises as `whole`."""
        whole = self.whole(graphs, weights, combine)
        return Blend.of(whole.members, whole.weights, combine, self.vocabulary, whole.experts)

    def resolve(self, weights: WeightChoice, combine: Combine = "linear") -> WeightChoice:
        """Return the choice that None stands for: adaptive weights where the bundle's are, as far as the mixture is
        linear, else fixed ones. Any other choice is returned as it is.
        """
        if weights is not None:
            return weights
        return ADAPTIVE if self.weights.adaptive and combine == "linear" else FIXED

    def experts(self, combine: Combine) -> Experts:
        """What adaptive weights choose among."""
        if combine != "linear":
            raise InputError(
                f'weights="{ADAPTIVE}" are those of the linear mixture, not of {combine!r}',
                'Leave combine out, or choose combine="linear".',
            )
        return Experts.of(self.names, self.weights.default, self.weights.domains)

    def shares(self, weights: WeightChoice) -> NDArray[np.float64]:
        """float64 [members], sum one, of weights that stay."""
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
        return normalise(self.weights.default if weights is None else weights, self.names)
