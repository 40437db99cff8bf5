"""Attribution: each member's share in a token that the mixture has generated.

Of P(y) = sum_i w_i P_i(y), member i's responsibility for y is its share w_i P_i(y) / P(y): the posterior probability
that y, drawn from the mixture, was drawn from member i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class TokenAttribution(NamedTuple):
    """The members' log-probabilities of a text's tokens, and their weights.

    Attributes:
        log_probabilities: float64 [members, tokens], the members' log-probabilities, nats.
        weights: float64 [members, tokens], their weights when the token was chosen.
    """

    log_probabilities: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[TokenAttribution]) -> TokenAttribution:
        """Concatenate the attributions of consecutive parts of a text."""
        log_probabilities, weights = zip(*parts, strict=True)
        return cls(np.concatenate(log_probabilities, axis=1), np.concatenate(weights, axis=1))

    def of_all(self, members: NDArray[np.int64], count: int) -> TokenAttribution:
        """Return the same for `count` members, of which these are `members`; the others have weight 0 and NaN."""
        shape = (count, self.log_probabilities.shape[1])
        log_probabilities, weights = np.full(shape, np.nan), np.zeros(shape)
        log_probabilities[members], weights[members] = self.log_probabilities, self.weights
        return TokenAttribution(log_probabilities, weights)

    def responsibilities(self) -> NDArray[np.float64]:
        """Return each member's share, float64 [tokens, members]; rows sum to one, a member of weight zero has zero."""
        with np.errstate(divide="ignore"):
            joint = np.where(self.weights > 0, self.log_probabilities + np.log(self.weights), -np.inf)
        shares = np.exp(joint - joint.max(axis=0))
        return np.asarray((shares / shares.sum(axis=0)).T)
