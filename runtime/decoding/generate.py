"""From prompts to chunks of text: choose the way of decoding, and build completions from its tokens."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from edgemix.errors import EdgemixError
from edgemix.runtime.decoding.speculative import SpeculativeDecoding
from edgemix.runtime.decoding.static_batch import StaticBatch
from edgemix.runtime.text.completion import CompletionBuilder
from edgemix.runtime.text.grammar import Grammar
from edgemix.runtime.token_progress import token_callback

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from edgemix.runtime.loaded_bundle import LoadedBundle
    from edgemix.runtime.mixing.attribution import TokenAttribution
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.options import Settings
    from edgemix.runtime.results import Chunk, Completion
    from edgemix.runtime.sequences.prefix_cache import PrefixCache


def decode(
    mixture: LoadedBundle,
    prompts: list[list[int]],
    settings: Settings,
    *,
    started: float,
    kept: PrefixCache | None = None,
) -> Generator[tuple[int, Chunk]]:
    """Continue prompts: yield the index of a prompt with its next chunk. Closing the generator frees the caches.

    Arguments are checked at once.

    Args:
        mixture: What generates.
        prompts: Token ids, at least one each.
        settings: Checked.
        started: `time.perf_counter()` when the call began.
        kept: For a single prompt: the prefix cache to use in the place of the mixture's.

    Raises:
        InputError: A prompt is longer than the context, or an option is out of its bounds.
    """
    for index, prompt in enumerate(prompts):
        mixture.check_length(prompt, "the prompt" if len(prompts) == 1 else f"prompt {index + 1}")
    ensemble = mixture.ensemble(settings.weights, settings.combine)
    grammar = Grammar.of(settings.constraint, mixture.tokenizer)
    call = _Call(mixture, ensemble, prompts, settings, settings.seeds(len(prompts)), grammar, kept)
    return call.generate(started)


def chunks(decoded: Generator[tuple[int, Chunk]]) -> Generator[Chunk]:
    """Yield the chunks that `decode` yields for a single prompt, without its index."""
    with closing(decoded):
        for _, chunk in decoded:
            yield chunk


def completed(answer: Iterable[Chunk]) -> Completion:
    """Return the completion that the last chunk carries.

    Raises:
        EdgemixError: It carries none.
    """
    *_, last = answer
    if last.completion is None:
        raise EdgemixError("generation ended without a completion")
    return last.completion


@dataclass(frozen=True, slots=True)
class _Call:
    """The checked arguments of a call."""

    mixture: LoadedBundle
    ensemble: Ensemble
    prompts: list[list[int]]
    settings: Settings
    seeds: list[int | None]
    grammar: Grammar | None
    kept: PrefixCache | None

    def generate(self, started: float) -> Generator[tuple[int, Chunk]]:
        """See `decode`.

        Raises:
            EdgemixError: A graph fails, or computes something that is not a number.
        """
        decoding = self._decoding()
        with closing(decoding):
            builders = self._builders(decoding, started)
            total = sum(map(len, self.prompts)) * len(self.ensemble.graphs)
            with self.settings.progress.stage("prompt", total) as task, token_callback(task.advance):
                tokens = decoding.step()
            while tokens:
                finished: set[int] = set()
                for token in tokens:
                    # A step may yield tokens after a stop string.
                    if token.sequence in finished or (chunk := builders[token.sequence].add(token)) is None:
                        continue
                    if chunk.completion is not None:
                        finished.add(token.sequence)
                        decoding.finish(token.sequence)
                    yield token.sequence, chunk
                tokens = decoding.step()

    def _builders(self, decoding: StaticBatch | SpeculativeDecoding, started: float) -> list[CompletionBuilder]:
        mixture, settings = self.mixture, self.settings
        members = mixture.full_ensemble(settings.weights, settings.combine).active if settings.attribution else None

        def attribution(sequence: int, first: int) -> TokenAttribution:
            found = decoding.attribution(sequence, first)
            return found if members is None else found.of_all(members, len(mixture.members))

        return [
            CompletionBuilder(
                mixture.tokenizer,
                prompt,
                settings.stop,
                batch_tokens=sum(map(len, self.prompts)),
                started=started,
                log_probabilities=partial(decoding.log_probabilities, i),
                attribution=partial(attribution, i) if settings.attribution else None,
            )
            for i, prompt in enumerate(self.prompts)
        ]

    def _decoding(self) -> StaticBatch | SpeculativeDecoding:
        """Return speculative decoding for a single sequence, and a static batch for several.

        With a seed, tokens are sampled one by one in any case, so that they are the same alone, in a batch, and on a
        machine of another speed.
        """
        settings, mixture = self.settings, self.mixture
        speculation = settings.speculation
        if speculation == "auto" and mixture.plan is not None:
            speculation = mixture.plan.speculation
        drafts = speculation if settings.sampling.temperature == 0 or self.seeds[0] is None else "off"
        if len(self.prompts) == 1 and (drafts != "off" or self.kept is not None):
            return SpeculativeDecoding(
                self.ensemble,
                self.prompts[0],
                settings.sampling,
                seed=self.seeds[0],
                max_new_tokens=settings.max_new_tokens,
                context=mixture.context,
                eos=mixture.manifest.tokenizer.eos,
                student=mixture.drafting if drafts in ("auto", "student") else None,
                lookup=drafts in ("auto", "lookup"),
                ngrams=mixture.ngrams if drafts in ("auto", "lookup") else None,
                lazy=drafts != "off" and not settings.attribution,
                grammar_state=self.grammar.follow() if self.grammar else None,
                prefixes=mixture.prefixes if self.kept is None else self.kept,
            )
        return StaticBatch(
            self.ensemble,
            self.prompts,
            settings.sampling,
            seeds=self.seeds,
            max_new_tokens=settings.max_new_tokens,
            context=mixture.context,
            eos=mixture.manifest.tokenizer.eos,
            grammar_states=[self.grammar.follow() for _ in self.prompts] if self.grammar else (),
            attribution=settings.attribution,
            prefixes=mixture.prefixes,
        )
