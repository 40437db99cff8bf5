"""From prompts to chunks of text: which way of decoding a call takes, and its tokens written down as they come."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from edgemix.runtime.engine import Decoding
from edgemix.runtime.speculative import SpeculativeDecoding
from edgemix.runtime.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Generator

    from edgemix.runtime.blend import Blend
    from edgemix.runtime.mixture import Mixture
    from edgemix.runtime.options import Settings
    from edgemix.runtime.results import Chunk


def generate(
    mixture: Mixture,
    blend: Blend,
    prompts: list[list[int]],
    settings: Settings,
    *,
    seeds: list[int | None],
    started: float,
) -> Generator[tuple[int, Chunk]]:
    """Continue prompts: yields the index of a prompt with its next chunk. Closing it frees the caches.

    Args:
        mixture: Whose tokenizer, context, student and prefixes serve.
        blend: What generates.
        prompts: Token ids, at least one each, no more than the context.
        settings: Checked.
        seeds: One a prompt; None draws from the system's entropy.
        started: `time.perf_counter()` when the call began.

    Raises:
        EdgemixError: A graph fails, or computes something that is not a number.
    """
    prompt_tokens = sum(map(len, prompts))
    decoding = _decoding(mixture, blend, prompts, settings, seeds)
    writers = [
        Writer(
            mixture.tokenizer,
            prompt,
            settings.stop,
            batch_tokens=prompt_tokens,
            started=started,
            log_probabilities=partial(decoding.log_probabilities, i),
        )
        for i, prompt in enumerate(prompts)
    ]
    with closing(decoding):
        while tokens := decoding.step():
            finished: set[int] = set()
            for token in tokens:
                # A step may bring tokens behind a stop string.
                if token.sequence in finished or (chunk := writers[token.sequence].add(token)) is None:
                    continue
                if chunk.completion is not None:
                    finished.add(token.sequence)
                    decoding.finish(token.sequence)
                yield token.sequence, chunk


def chunks(decoded: Generator[tuple[int, Chunk]]) -> Generator[Chunk]:
    """What `generate` yields for a prompt alone, without its index."""
    with closing(decoded):
        for _, chunk in decoded:
            yield chunk


def _decoding(
    mixture: Mixture, blend: Blend, prompts: list[list[int]], settings: Settings, seeds: list[int | None]
) -> Decoding | SpeculativeDecoding:
    """A sequence alone in fewer calls, several as a batch; what is drawn with a seed token by token in any case, so
    that it is the same alone, in a batch, and on a machine of another speed.
    """
    sampling, budget, eos = settings.sampling, settings.max_new_tokens, mixture.manifest.tokenizer.eos
    repeatable = sampling.temperature == 0 or seeds[0] is None
    speculation = settings.speculation
    if speculation == "auto" and mixture.plan is not None:
        speculation = mixture.plan.speculation
    if len(prompts) == 1 and repeatable and speculation != "off":
        return SpeculativeDecoding(
            blend,
            prompts[0],
            sampling,
            seed=seeds[0],
            max_new_tokens=budget,
            context=mixture.context,
            eos=eos,
            student=mixture.drafting if speculation in ("auto", "student") else None,
            lookup=speculation in ("auto", "lookup"),
            prefixes=mixture.prefixes,
        )
    return Decoding(blend, prompts, sampling, seeds=seeds, max_new_tokens=budget, context=mixture.context, eos=eos)
