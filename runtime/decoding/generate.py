"""From prompts to chunks of text: which way of decoding a call takes, and its tokens written down as they come."""

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
from edgemix.runtime.token_progress import told

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from edgemix.runtime.mixing.attribution import TokenAttribution
    from edgemix.runtime.mixing.ensemble import Ensemble
    from edgemix.runtime.mixture import Mixture
    from edgemix.runtime.options import Settings
    from edgemix.runtime.results import Chunk, Completion
    from edgemix.runtime.sequences.prefix_cache import PrefixCache


def decode(
    mixture: Mixture, prompts: list[list[int]], settings: Settings, *, started: float, kept: PrefixCache | None = None
) -> Generator[tuple[int, Chunk]]:
    """Continue prompts: yields the index of a prompt with its next chunk. Closing it frees the caches.

    Arguments are checked at once.

    Args:
        mixture: Whose members, tokenizer, context, student and prefixes serve.
        prompts: Token ids, at least one each.
        settings: Checked.
        started: `time.perf_counter()` when the call began.
        kept: Of one prompt alone, what was read of it before, and where all of it will be kept.

    Raises:
        InputError: A prompt is longer than the context, or an option makes no sense.
    """
    for index, prompt in enumerate(prompts):
        mixture.check_length(prompt, "the prompt" if len(prompts) == 1 else f"prompt {index + 1}")
    ensemble = mixture.ensemble(settings.weights, settings.combine)
    grammar = Grammar.of(settings.constraint, mixture.tokenizer)
    call = _Call(mixture, ensemble, prompts, settings, settings.seeds(len(prompts)), grammar, kept)
    return call.generate(started)


def chunks(decoded: Generator[tuple[int, Chunk]]) -> Generator[Chunk]:
    """What `decode` yields for a prompt alone, without its index."""
    with closing(decoded):
        for _, chunk in decoded:
            yield chunk


def completed(answer: Iterable[Chunk]) -> Completion:
    """The completion that the last chunk carries.

    Raises:
        EdgemixError: It carries none.
    """
    *_, last = answer
    if last.completion is None:
        raise EdgemixError("generation ended without a completion")
    return last.completion


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything that a call is about, checked."""

    mixture: Mixture
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
            writers = self._writers(decoding, started)
            total = sum(map(len, self.prompts)) * len(self.ensemble.graphs)
            with self.settings.progress.stage("prompt", total) as task, told(task.advance):
                tokens = decoding.step()
            while tokens:
                finished: set[int] = set()
                for token in tokens:
                    # A step may bring tokens behind a stop string.
                    if token.sequence in finished or (chunk := writers[token.sequence].add(token)) is None:
                        continue
                    if chunk.completion is not None:
                        finished.add(token.sequence)
                        decoding.finish(token.sequence)
                    yield token.sequence, chunk
                tokens = decoding.step()

    def _writers(self, decoding: StaticBatch | SpeculativeDecoding, started: float) -> list[CompletionBuilder]:
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
        """A sequence alone in fewer calls, several as a batch. What is drawn with a seed is drawn token by token in any
        case, so that it is the same alone, in a batch, and on a machine of another speed.
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
