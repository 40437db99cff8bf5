"""A sequence to generate, and what was generated of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgemix.runtime.mixing.attribution import TokenAttribution

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.mixing.adaptive import AdaptivePrior
    from edgemix.runtime.mixing.arithmetic import Combine
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.text.grammar import GrammarState


@dataclass(eq=False)
class GenerationRequest:
    """A sequence to generate.

    Attributes:
        weights: float64 [active members of the batch]; a weight of zero leaves a member out.
        combine: How the members' distributions are mixed.
        prior: What adaptive weights choose among, over the same members; None for fixed weights.
        prompt: int64 [tokens], at least one.
        sampling: How tokens are chosen.
        generator: Source of randomness.
        budget: Most tokens that are still generated.
        eos: Ids that finish the sequence with "stop".
        grammar_state: Where the text must follow a grammar.
        attribution: Keep the members' log-probabilities of each token.
        log_probabilities: Of the tokens so far, under the mixture, nats.
        attributions: One per token so far.
    """

    weights: NDArray[np.float64]
    combine: Combine
    prior: AdaptivePrior | None
    prompt: NDArray[np.int64]
    sampling: Sampling
    generator: np.random.Generator
    budget: int
    eos: frozenset[int]
    grammar_state: GrammarState | None = None
    attribution: bool = False
    log_probabilities: list[float] = field(default_factory=list)
    attributions: list[TokenAttribution] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        members: NDArray[np.int64],
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        seed: int | None,
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
        grammar_state: GrammarState | None = None,
        attribution: bool = False,
    ) -> GenerationRequest:
        """Return the request for a prompt.

        Args:
            ensemble: Whose weights mix the members.
            members: int64, the indices among the ensemble's members of those that the batch serves.
            prompt: Token ids, at least one.
            sampling: How tokens are chosen.
            seed: None draws from the system's entropy.
            max_new_tokens: Most tokens.
            context: Most tokens that are read of a sequence; what would follow ends with finish reason "length".
            eos: Ids that finish a sequence with "stop"; the id itself is the last token.
            grammar_state: Where the text must follow a grammar.
            attribution: Keep the members' log-probabilities of each token.
        """
        return cls(
            weights=ensemble.weights[members],
            combine=ensemble.combine,
            prior=ensemble.prior.narrowed(members) if ensemble.prior else None,
            prompt=np.asarray(prompt, np.int64),
            sampling=sampling,
            generator=np.random.default_rng(seed),
            # The last token is never read, so it may lie one beyond the context.
            budget=min(max_new_tokens, context - len(prompt) + 1),
            eos=frozenset(eos),
            grammar_state=grammar_state,
            attribution=attribution,
        )

    def attribution_from(self, first: int = 0) -> TokenAttribution:
        """Return the attribution of the tokens so far, from index `first` on."""
        return TokenAttribution.joined(self.attributions[first:])
