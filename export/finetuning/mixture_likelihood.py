"""The likelihood of a mixture as a training loss of members and weights: generalized expectation-maximization.

The loss of a token y after x is -log p(y | x), p = sum_i w_i p_i. Its gradient with respect to member i's parameters is

    r_i * grad(-log p_i(y | x)),   r_i = w_i p_i(y | x) / p(y | x)

so each member learns from a token by its responsibility r_i, the posterior probability that it generated the token
(Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive mixtures of local experts"). One gradient step on every member, and a
step of the weights towards their mean responsibilities, raise a lower bound of the likelihood without maximizing it: a
generalized EM algorithm (Neal and Hinton 1998).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_DECAY = 0.6
"""Step t moves the weights by the fraction t^-0.6. An exponent between 1/2 and 1 lets them converge, yet forget the
members' initial state (Cappé and Moulines 2009, "On-line expectation-maximization algorithm for latent data models").
"""


class MixtureLikelihood:
    """The loss of a mixture.

    Args:
        token_losses: Each member's function from token ids [batch, length] to token losses [tokens]; see
            `token_loss.token_losses`. All are called before gradients are computed.
        weights: fp32 [members], above zero, with sum one; changed in place by `update_weights`.
    """

    def __init__(self, token_losses: Sequence[Callable[[Tensor], Tensor]], weights: Tensor) -> None:
        self._token_losses = token_losses
        self.weights = weights
        self._responsibilities = torch.zeros_like(weights)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the mean loss in nats per token, and accumulate the responsibilities for `update_weights`.

        Args:
            ids: int64 [batch, length].
        """
        log_joint = self.weights.log()[:, None] + self.log_probabilities(ids)
        log_mixture = log_joint.logsumexp(0)
        self._responsibilities += (log_joint - log_mixture).detach().exp().sum(1)
        return -log_mixture.mean()

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Return each member's log-probability of each token after a row's first: fp32 [members, tokens]."""
        return torch.stack([-losses(ids) for losses in self._token_losses])

    def update_weights(self, steps: int) -> None:
        """Move the weights towards the mean responsibilities of the tokens since the last call.

        Args:
            steps: Number of steps taken, including this one; the first steps are larger.
        """
        mean = self._responsibilities / self._responsibilities.sum()
        self.weights.lerp_(mean, (steps + 1) ** -_DECAY)
        self.weights /= self.weights.sum()
        self._responsibilities.zero_()
