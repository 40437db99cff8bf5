"""Sampling: pure filters over log-probabilities, chained in the order that Hugging Face uses.

Every filter takes scores float32 [vocabulary] (log-probabilities, normalized or not) and returns scores of the same
shape in which the tokens that it rules out are -inf. At least one token always stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError
from edgemix.numbers import is_finite, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

_IMPOSSIBLE = np.float32(-np.inf)
_COLDEST = 1e-30
_BLOCK = 256
"""Tokens that are summed before the cumulative distribution is taken; about the square root of a vocabulary."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Each default leaves its filter out.

    Attributes:
        temperature: Divides the scores; 0 takes the most probable token (greedy).
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the smallest set of most probable tokens that holds this share of the probability.
        min_p: Keep tokens at least this share as probable as the most probable one.
        repetition_penalty: Above 1, tokens of the text so far (prompt included) become less probable: see
            `penalize_repetition`, which is applied to each member's logits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether tokens are sampled with the mixture's own probabilities: no temperature, no filter."""
        return (self.temperature, self.top_k, self.top_p, self.min_p) == (1, 0, 1, 0)

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0 and is_finite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100 (1 is none)"),
        }
        if wrong := [
            f"{name} must be {range_}, not {shown(getattr(self, name))}"
            for name, (ok, range_) in checks.items()
            if not ok
        ]:
            raise InputError("; ".join(wrong))


def choose_token(log_probabilities: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """Return the next token id.

    Args:
        log_probabilities: [vocabulary]; they stay as they are. A repetition penalty is in them already.
        sampling: How to choose.
        generator: Where the randomness comes from; one number is drawn a token, none where temperature is 0.
    """
    if sampling.temperature == 0:
        return int(log_probabilities.argmax())
    return sample(_filtered(log_probabilities, sampling), generator)


def distribution(log_probabilities: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float32]:
    """Return the probabilities [vocabulary] that `choose_token` samples with; if it is greedy, those of temperature 1.

    Args:
        log_probabilities: As there.
        sampling: As there.
    """
    scores = _filtered(log_probabilities, sampling) if sampling.temperature else log_probabilities
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return np.asarray(shares)


def _filtered(log_probabilities: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float32]:
    # The best score is 0 whatever it is divided by; a temperature that float32 cannot hold is as good as a tiny one.
    scores = (log_probabilities - log_probabilities.max()) / np.float32(max(sampling.temperature, _COLDEST))
    scores = keep_top_k(scores, sampling.top_k)
    scores = keep_top_p(scores, sampling.top_p)
    return keep_min_p(scores, sampling.min_p)


def penalize_repetition(scores: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    """Scale a model's logits of tokens in `seen`: negative ones times `penalty`, others over it (Keskar et al. 2019).

    Log-probabilities would not do: they are all negative, and those of likely tokens too small to matter.
    """
    if penalty == 1:
        return scores
    penalized = scores.copy()
    old = scores[seen]
    penalized[seen] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return penalized


def keep_top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Rule out all but the k highest scores, and those equal to the k-th; 0 rules out nothing."""
    if k == 0 or k >= len(scores):
        return scores
    return _from(scores, np.partition(scores, -k)[-k])


def keep_top_p(scores: NDArray[np.float32], p: float) -> NDArray[np.float32]:
    """Keep the nucleus, the smallest set of highest scores whose share is at least p (Holtzman et al. 2020)."""
    if p >= 1:
        return scores
    shares = np.exp(scores - scores.max())
    total = float(shares.sum(dtype=np.float64))
    # Tokens below this hold less than 1 - p even all together, so none of them is needed (a hair less, for rounding).
    needed = (1 - p) * total / len(shares) * (1 - 1e-6)
    best = np.sort(shares[shares >= needed])[::-1]
    cumulative = np.cumsum(best, dtype=np.float64)
    last = min(int(np.searchsorted(cumulative, p * total)), len(best) - 1)
    return np.where(shares >= best[last], scores, _IMPOSSIBLE)


def keep_min_p(scores: NDArray[np.float32], p: float) -> NDArray[np.float32]:
    """Rule out tokens less than p times as probable as the most probable one (Nguyen et al. 2024)."""
    return scores if p == 0 else _from(scores, scores.max() + np.float32(math.log(p)))


def sample(scores: NDArray[np.float32], generator: np.random.Generator) -> int:
    """Sample a token id with probability softmax(scores)."""
    return draw(np.exp(scores - scores.max()), generator)


def draw(shares: NDArray[np.float32], generator: np.random.Generator) -> int:
    """Draw a token id by its share [vocabulary], not negative, of any sum above zero; inverts the cumulative sum.

    First over blocks of tokens, then within one: summing is many times faster than accumulating.
    """
    starts = np.arange(0, len(shares), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(shares, starts, dtype=np.float64))
    drawn = generator.random() * blocks[-1]
    block = int(np.searchsorted(blocks, drawn, side="right"))
    start = int(starts[block])
    within = np.cumsum(shares[start : start + _BLOCK], dtype=np.float64)
    # Rounding must not lead past the block's last possible token.
    rest = min(drawn - (blocks[block - 1] if block else 0.0), np.nextafter(within[-1], 0.0))
    return start + int(np.searchsorted(within, rest, side="right"))


def _from(scores: NDArray[np.float32], threshold: np.float32) -> NDArray[np.float32]:
    return np.where(scores >= threshold, scores, _IMPOSSIBLE)
