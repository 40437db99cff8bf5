"""Static batches: all prompts at once, then one token a step for each sequence that is not finished."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import EdgemixError
from edgemix.runtime.decoding.batch import BatchSequence, ContinuousBatch
from edgemix.runtime.decoding.request import GenerationRequest
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.mixing.arithmetic import log_softmax
from edgemix.runtime.sequences.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.decoding.tokens import Token
    from edgemix.runtime.mixing.attribution import TokenAttribution
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.text.grammar import GrammarState


class StaticBatch:
    """Generation for a list of prompts: every `step` gives each sequence that is not finished its next token.

    It is a `ContinuousBatch` that all sequences join in the first step. Finished sequences leave the batch. The result
    of a sequence does not depend on the others.

    Args:
        ensemble: What generates.
        prompts: Token ids, at least one each.
        sampling: How tokens are chosen.
        seeds: One a prompt; None draws from the system's entropy.
        max_new_tokens: Most tokens for each.
        context: Most tokens that are read of a sequence; what would follow ends with finish reason "length".
        eos: Ids that finish a sequence with "stop"; the id itself is the last token.
        grammar_states: One a prompt, where texts must follow a grammar.
        attribution: Keep the members' log-probabilities of each token, for `attribution`.
        prefixes: Texts that were read before, and where the prompts are kept.

    Attributes:
        batch: The batch that the sequences join.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int | None],
        max_new_tokens: int,
        context: int,
        eos: Iterable[int],
        grammar_states: Sequence[GrammarState] = (),
        attribution: bool = False,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.batch = ContinuousBatch(ensemble, len(prompts), prefixes)
        self._requests = [
            GenerationRequest.of(
                ensemble,
                ensemble.active,
                prompt,
                sampling,
                seed=seed,
                max_new_tokens=max_new_tokens,
                context=context,
                eos=eos,
                grammar_state=grammar_states[index] if grammar_states else None,
                attribution=attribution,
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._indices = {id(request): index for index, request in enumerate(self._requests)}
        self._begun = False

    def step(self) -> list[Token]:
        """Return the next token of each unfinished sequence; empty when all are finished.

        The first step reads the prompts.

        Raises:
            EdgemixError: A graph fails, or computes something that is not a number.
        """
        if self._begun:
            results = self.batch.step()
        else:
            self._begun = True
            for request in self._requests:
                self.batch.add(request)
            results = self.batch.prefill()
        tokens = []
        for request, result in results:
            if isinstance(result, EdgemixError):
                raise result
            tokens.append(result._replace(sequence=self._indices[id(request)]))
        return sorted(tokens, key=lambda token: token.sequence)

    def log_probabilities(self, sequence: int) -> NDArray[np.float64]:
        """Return float64 [tokens], nats: of a sequence's tokens so far, under the mixture, before temperature and
        filters.
        """
        return np.array(self._requests[sequence].log_probabilities, np.float64)

    def attribution(self, sequence: int, first: int = 0) -> TokenAttribution:
        """Return the active members' attribution of a sequence's tokens so far, from index `first` on."""
        return self._requests[sequence].attribution_from(first)

    def finish(self, sequence: int) -> None:
        """Take a sequence out of the batch."""
        self.batch.cancel(self._requests[sequence])

    def close(self) -> None:
        """Free the caches."""
        self.batch.close()


def next_token_log_probabilities(
    ensemble: Ensemble, ids: Sequence[int], prefixes: PrefixCache | None = None
) -> NDArray[np.float32]:
    """Return the mixture's log-probabilities of the token after a text: float32 [vocabulary], nats.

    Args:
        ensemble: What predicts.
        ids: Token ids, at least one.
        prefixes: Texts that were read before.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.
    """
    request = GenerationRequest.of(
        ensemble, ensemble.active, ids, Sampling(), seed=0, max_new_tokens=1, context=len(ids), eos=()
    )
    known = PrefixCache(0) if prefixes is None else prefixes
    with closing(BatchSequence(request, ensemble.active_graphs(), ensemble.vocabulary, known)) as sequence:
        return sequence.mix(np.stack([log_softmax(logits) for logits in sequence.prefill()]))
