"""Who spoke: each member's share in a token that the mixture has said.

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
    """What members gave the tokens of a text.

    Attributes:
        own: float64 [members, tokens], log-probabilities, nats.
        weights: float64 [members, tokens], theirs when the token was chosen.
    """

    own: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[TokenAttribution]) -> TokenAttribution:
        """Of stretches of a text, one after the other."""
        own, weights = zip(*parts, strict=True)
        return cls(np.concatenate(own, axis=1), np.concatenate(weights, axis=1))

    def of_all(self, members: NDArray[np.int64], count: int) -> TokenAttribution:
        """The same for so many members, of which `members` were listened to; the others' log-probabilities are NaN."""
        own, weights = np.full((count, self.own.shape[1]), np.nan), np.zeros((count, self.own.shape[1]))
        own[members], weights[members] = self.own, self.weights
        return TokenAttribution(own, weights)

    def responsibilities(self) -> NDArray[np.float64]:
        """float64 [tokens, members], each row's sum one; zero for a member without weight."""
        with np.errstate(divide="ignore"):
            joint = np.where(self.weights > 0, self.own + np.log(self.weights), -np.inf)
        shares = np.exp(joint - joint.max(axis=0))
        return np.asarray((shares / shares.sum(axis=0)).T)
