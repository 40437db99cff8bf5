"""From the tokens of one sequence to its chunks of text and its completion."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from edgemix.runtime.results import Chunk, Completion, Timings
from edgemix.runtime.text.detokenizer import IncrementalDecoder, StopStrings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgemix.runtime.decoding.tokens import FinishReason, Token
    from edgemix.runtime.mixing.attribution import TokenAttribution
    from edgemix.runtime.text.tokenizer import Tokenizer


class CompletionBuilder:
    """Builds one completion from its tokens as they are generated.

    Args:
        tokenizer: Decodes the tokens.
        prompt: Token ids.
        stops: Stop strings.
        batch_tokens: Prompt tokens of the whole batch, for the prefill's rate.
        started: `time.perf_counter()` when the call began.
        log_probabilities: Called when the completion is finished, for the log-probabilities of all its tokens.
        attribution: Called for every chunk with the index of its first token, for the attribution of the tokens from
            there on; None leaves it out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        batch_tokens: int,
        started: float,
        log_probabilities: Callable[[], NDArray[np.float64]],
        attribution: Callable[[int], TokenAttribution] | None = None,
    ) -> None:
        self._log_probabilities, self._attribution = log_probabilities, attribution
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._prompt_tokens, self._batch_tokens, self._started = len(prompt), batch_tokens, started
        self._first = math.nan
        self._tokens: list[Token] = []
        self._emitted = 0
        self._text: list[str] = []

    def add(self, token: Token) -> Chunk | None:
        """Take the next token, and return a chunk where there is new text to show or the completion is finished."""
        if not self._tokens:
            self._first = time.perf_counter()
        self._tokens.append(token)
        text, stopped = self._read(token)
        reason: FinishReason | None = "stop" if stopped else token.finish_reason
        if not text and reason is None:
            return None
        self._text.append(text)
        first, self._emitted = self._emitted, len(self._tokens)
        ids = tuple(new.id for new in self._tokens[first:])
        return Chunk(text, ids, None if reason is None else self._complete(reason), *self._attribute(first))

    def _read(self, token: Token) -> tuple[str, bool]:
        """Return the text that the next token makes ready to be shown, and whether a stop string ends it."""
        # The end-of-text token is no text, even where a tokenizer does not know it as special.
        ended = token.finish_reason == "stop"
        pieces = [(self._decoder.rest() if ended else self._decoder.add(token.id), False)]
        if ended or token.id in self._tokenizer.special:
            pieces.append((self._tokenizer.token(token.id), True))
        if token.finish_reason == "length":
            pieces.append((self._decoder.rest(), False))
        shown = ""
        for piece, hidden in pieces:
            text, stopped = self._stops.add(piece, hidden=hidden)
            shown += text
            if stopped:
                return shown, True
        return (shown if token.finish_reason is None else shown + self._stops.rest()), False

    def _complete(self, reason: FinishReason) -> Completion:
        log_probabilities = self._log_probabilities()[: len(self._tokens)]
        responsibilities, member_logprobs = self._attribute(0)
        return Completion(
            text="".join(self._text),
            token_ids=tuple(token.id for token in self._tokens),
            finish_reason=reason,
            log_probabilities=log_probabilities,
            prompt_tokens=self._prompt_tokens,
            timings=self._timings(),
            responsibilities=responsibilities,
            member_logprobs=member_logprobs,
        )

    def _attribute(self, first: int) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """Return responsibilities and log-probabilities [tokens, members] of the tokens from index `first` on."""
        if self._attribution is None:
            return None, None
        count, attribution = len(self._tokens) - first, self._attribution(first)
        return attribution.responsibilities()[:count], attribution.log_probabilities[:, :count].T.copy()

    def _timings(self) -> Timings:
        ttft = self._first - self._started
        later = len(self._tokens) - 1
        tpot = (time.perf_counter() - self._first) / later if later else math.nan
        return Timings(ttft, tpot, self._batch_tokens / ttft, 1 / tpot)
