"""Results of the runtime: completions, chunks and scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemix.runtime.decoding.tokens import FinishReason


@dataclass(frozen=True, slots=True)
class Timings:
    """Timings of one completion.

    Attributes:
        ttft: Seconds from the call to the first token (prefill of the whole batch).
        tpot: Mean seconds a token after the first; NaN if there is only one.
        prefill_rate: Prompt tokens a second, of the whole batch.
        decode_rate: Tokens a second after the first, of this completion; NaN if there is only one.
    """

    ttft: float
    tpot: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated text.

    Attributes:
        text: The generated text without special tokens, cut before the stop string if one was found.
        token_ids: All generated tokens, including the end-of-text token or those of the stop string.
        finish_reason: `stop` (end-of-text token or stop string) or `length` (max_new_tokens or the context).
        log_probabilities: float64 [tokens], of `token_ids` under the mixture, before temperature and filters, in nats;
            the same in a batch, and within 1e-6 with and without speculation.
        prompt_tokens: Number of tokens of the prompt.
        timings: How long it took.
        responsibilities: float64 [tokens, members], each member's share in the token, in the manifest's order; None
            without `attribution`.
        member_logprobs: float64 [tokens, members], the token's log-probability under each member, nats; NaN for members
            of weight zero.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    log_probabilities: NDArray[np.float64]
    prompt_tokens: int
    timings: Timings
    responsibilities: NDArray[np.float64] | None = None
    member_logprobs: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion as it is generated: new text and tokens; the last one carries the whole completion.

    `responsibilities` and `member_logprobs` are those of the new tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None
    responsibilities: NDArray[np.float64] | None = None
    member_logprobs: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a text is.

    Attributes:
        token_ids: int64 [tokens].
        log_probabilities: float64 [tokens - 1], of every token after the first under the mixture, in nats.
        member_log_probabilities: float64 [members, tokens - 1], the same for each member, in the manifest's order.
        scored_bytes: UTF-8 bytes of the scored tokens.
    """

    token_ids: NDArray[np.int64]
    log_probabilities: NDArray[np.float64]
    member_log_probabilities: NDArray[np.float64]
    scored_bytes: int

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-probability of a scored token."""
        return math.exp(-float(self.log_probabilities.mean()))

    @property
    def bits_per_byte(self) -> float:
        """Negative log2-probability of the scored tokens, by their UTF-8 bytes."""
        return -float(self.log_probabilities.sum()) / math.log(2) / self.scored_bytes
