"""`Mixture`: the one object that an app embeds. A bundle goes in, text comes out."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import msgspec
import numpy as np

from edgemix.bundle.reader import ngram_table, read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS
from edgemix.runtime.cancellation import in_thread, iterate
from edgemix.runtime.decoding.generate import chunks, completed, decode
from edgemix.runtime.decoding.static_batch import next_token_log_probabilities
from edgemix.runtime.evaluation.scoring import score_tokens
from edgemix.runtime.graphs.loading import open_graphs
from edgemix.runtime.graphs.providers import choose
from edgemix.runtime.loaded_bundle import LoadedBundle
from edgemix.runtime.machine.plan import find_plan
from edgemix.runtime.options import ChatOptions, GenerateOptions, Settings
from edgemix.runtime.results import Chunk, Completion, Score
from edgemix.runtime.sequences import prefix_file
from edgemix.runtime.sequences.prefix_cache import PrefixCache
from edgemix.runtime.serving.scheduler import BatchScheduler
from edgemix.runtime.session import Session
from edgemix.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.bundle.manifest import Manifest, MemberEntry
    from edgemix.progress import Progress
    from edgemix.runtime.machine.plan import RuntimePlan
    from edgemix.runtime.mixing.arithmetic import Combine
    from edgemix.runtime.mixing.ensemble import WeightChoice

PREFIX_BYTES = 64 << 20
"""Default memory of the prefix cache; of SmolLM2-135M it holds 1,400 tokens of one member."""


class Mixture(LoadedBundle):
    """Several language models that answer as one:  P(y | x) = sum_i w_i P_i(y | x).

    A loaded mixture does not change, and every call has caches of its own: threads may share one mixture and call it at
    the same time. They also share the cores, so for throughput give one call a batch. Only `close` must come after all
    calls have ended.

    Interrupting a call (Ctrl-C, closing a stream) frees its caches and leaves the mixture as it was.

    Attributes:
        manifest: The bundle's manifest; for a student alone, a manifest with it as the only member.
        members: The members' names, in the manifest's order.
        weights: Member name -> share: the bundle's fixed weights.
        tokenizer: Text to token ids and back.
        vocabulary: Number of token ids that every member has rows for.
        context: Most tokens of a sequence: the smallest of the members' contexts.
        provider: Where the graphs run, by its name in `PROVIDERS`.
        ngrams: N-grams of the training text, to draft from; None where the bundle has none.
        plan: The fastest settings measured for this bundle on this machine, where they are used.
        prefixes: The cache of texts that were read: a text with the same beginning is not read again from its start.
    """

    @classmethod
    def load(
        cls,
        path: str | Path,
        provider: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        *,
        student: bool = False,
        drafts: bool | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        packed: str | Path | None = None,
        plan: bool = True,
    ) -> Self:
        """Open a bundle.

        Args:
            path: The bundle's folder.
            provider: "cpu", "cuda", "cuda-graphs" (calls of one shape are recorded and replayed), or "auto": CUDA where
                it works, else the CPU; `provider` then tells which.
            threads: Threads within an operator; as many as there are physical cores by default.
            verify: Compare the checksums of all files. Without it only structure, paths and sizes are checked.
            student: Open the student alone, a mixture of one; the members' files are not read.
            drafts: Open the student beside the members, where there is one, to draft what they verify; by default
                unless the plan says otherwise.
            prefix_bytes: Most memory of the prefix cache; 0 turns it off.
            packed: A folder of your own for weights in the layout of this machine's kernels, two to three times their
                size: written at the first load, mapped into memory from then on.
            plan: Where `edgemix profile --recommend` has measured what is fastest for this bundle on this machine, take
                threads, drafts, and what speculation="auto" means, from there; what is given here or in a call wins.

        Raises:
            BundleError: The bundle is missing, damaged, unsafe, or its graphs do not load.
            InputError: It has no student, and that was asked for.
            EdgemixError: The provider asked for does not work here.
        """
        bundle = Path(path)
        manifest = read_manifest(bundle)
        alone = _required_student(bundle, manifest) if student else None
        verify_bundle(bundle, manifest, checksums=verify, only=alone)
        if prefix_bytes < 0:
            raise InputError(f"prefix_bytes must be 0 or more, not {prefix_bytes}")
        found = find_plan(manifest, choose(provider)) if plan and not student else None
        if found is not None and drafts not in (None, found.drafts):
            found = msgspec.structs.replace(found, drafts=drafts, speculation="auto")
        if drafts is None:
            drafts = found is None or found.drafts
        return cls.assemble(
            bundle,
            manifest.alone(alone) if alone else manifest,
            provider,
            threads if threads is not None or found is None else found.threads,
            drafts=drafts and not student,
            prefix_bytes=prefix_bytes,
            packed=None if packed is None else Path(packed),
            plan=found,
        )

    @classmethod
    def assemble(
        cls,
        bundle: Path,
        manifest: Manifest,
        provider: str = "auto",
        threads: int | None = None,
        *,
        drafts: bool = False,
        prefix_bytes: int = 0,
        packed: Path | None = None,
        plan: RuntimePlan | None = None,
    ) -> Self:
        """Open the files of a bundle that is being made, by its manifest.

        Raises:
            BundleError: A file is damaged, or a graph does not load.
            EdgemixError: The provider asked for does not work here.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        chosen = choose(provider)
        tokenizer = Tokenizer.load(bundle, manifest.tokenizer, manifest.vocabulary)
        opened, drafter = open_graphs(bundle, manifest, chosen, threads, student=drafts, packed=packed)
        ngrams = ngram_table(bundle, manifest)
        return cls(
            manifest,
            opened,
            tokenizer,
            chosen,
            drafter=drafter,
            ngrams=ngrams,
            prefix_bytes=prefix_bytes,
            plan=plan,
        )

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    @overload
    def generate(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    def generate(
        self, prompts: str | Sequence[str], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several of any lengths as a batch.

        Args:
            prompts: One text, or several.
            options: See `GenerateOptions`.

        Returns:
            A completion, or a list of them in the prompts' order.

        Raises:
            InputError: A prompt is empty or longer than the context, or an option is out of its bounds.
        """
        settings = Settings.of(**options)
        started = time.perf_counter()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        completions: dict[int, Completion] = {}
        names = ["the prompt"] if len(texts) == 1 else [f"prompt {index + 1}" for index in range(len(texts))]
        ids = [self.encode_prompt(text, name) for text, name in zip(texts, names, strict=True)]
        with closing(decode(self, ids, settings, started=started)) as decoded:
            for index, chunk in decoded:
                if chunk.completion is not None:
                    completions[index] = chunk.completion
        ordered = [completions[index] for index in range(len(texts))]
        return ordered[0] if isinstance(prompts, str) else ordered

    def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """Continue one prompt, and yield the text as it is generated: whole characters, and no part of a stop string.

        Arguments are checked at once. The last chunk carries the completion. Closing the iterator ends the work.
        """
        return self._stream(self.encode_prompt(prompt), Settings.of(**options))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self, prompts: str, **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    @overload
    async def agenerate(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    async def agenerate(
        self, prompts: str | Sequence[str], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]:
        """As `generate`, for asyncio: the work is done in a thread, and cancelled with the task."""
        return await in_thread(lambda: self.generate(prompts, **options))

    def astream(self, prompt: str, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk]:
        """As `stream`, for asyncio. Closing it, or cancelling the task that waits for it, cancels the work.

        For many requests at once `serve` has more throughput; its handles can be iterated and awaited, too.
        """
        return iterate(self._stream(self.encode_prompt(prompt), Settings.of(**options)))

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """Begin a conversation that reads only new tokens at each turn.

        Args:
            messages: Its beginning, such as a system message.
        """
        return Session(self, messages)

    def restore(self, path: str | Path) -> Session:
        """Return the session that `Session.save` wrote to a file. If another bundle wrote it, its text is read again at
        the next turn.

        Open only files of your own: their key-value state is trusted.

        Raises:
            InputError: There is no such file, or it is damaged.
        """
        kept = PrefixCache(None, texts=1)
        _, messages = prefix_file.read(Path(path), kept, self.manifest, self.graphs())
        return Session(self, messages, kept)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Completion:
        """Generate the assistant's next message in a conversation, by the tokenizer's chat template.

        Args:
            messages: Mappings with `role` ("system", "user", "assistant") and `content`.
            options: See `ChatOptions`.

        Raises:
            InputError: The bundle has no chat template, or it refuses the messages; as `generate`.
        """
        return completed(self.stream_chat(messages, **options))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Chunk]:
        """As `chat`, chunk by chunk as `stream`."""
        ids = self.render_chat(messages, tools=tools, parse_special=parse_special)
        return self._stream(ids, Settings.of(**options))

    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        texts: str,
        weights: WeightChoice = None,
        combine: Combine = "linear",
        *,
        window: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> Score: ...

    @overload
    def score(
        self,
        texts: Sequence[str],
        weights: WeightChoice = None,
        combine: Combine = "linear",
        *,
        window: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> list[Score]: ...

    def score(
        self,
        texts: str | Sequence[str],
        weights: WeightChoice = None,
        combine: Combine = "linear",
        *,
        window: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> Score | list[Score]:
        """Compute how probable texts are under the mixture and under each member.

        A text longer than `window` is read in windows of that many tokens, each with an empty past but for the
        beginning-of-text token, where the model family has one. The first token of a window is scored as the
        continuation of the window before, so every token but the text's first is scored. The memory needed does not
        grow with the text. All members are evaluated, whatever their weights.

        Args:
            texts: One text, or several; each at least two tokens (a beginning-of-text token counts).
            weights: As in `GenerateOptions`; so is `combine`.
            combine: How the members are mixed.
            window: Most tokens that are read with one past; the context by default, and at most.
            progress: Progress callback, in scored tokens.

        Raises:
            InputError: A text is too short, or an argument is out of its bounds.
        """
        ensemble = self.full_ensemble(weights, combine)
        window = self.context if window is None else window
        encoded = [
            self.tokenizer.encode_for_scoring(text) for text in ([texts] if isinstance(texts, str) else list(texts))
        ]
        scores = []
        with progress.stage("scoring", sum(len(ids) - 1 for ids, _ in encoded)) as task:
            for token_ids, scored_bytes in encoded:
                ids = np.array(token_ids, np.int64)
                mixed, own = score_tokens(
                    ensemble.graphs,
                    ensemble.weights,
                    ids,
                    combine=combine,
                    prior=ensemble.prior,
                    vocabulary=self.vocabulary,
                    window=window,
                    bos=self.tokenizer.entry.bos,
                    advance=task.advance,
                )
                scores.append(Score(ids, mixed, own, scored_bytes))
        return scores[0] if isinstance(texts, str) else scores

    def next_token_distribution(
        self, text: str, weights: WeightChoice = None, combine: Combine = "linear"
    ) -> NDArray[np.float64]:
        """Return the probability of every token id to come next after a text: float64 [token ids], sum one.

        Tokens that not every member has rows for are included, with probability zero.

        Raises:
            InputError: The text is empty or longer than the context, or an argument is out of its bounds.
        """
        ids = self.encode_prompt(text, "the text")
        mixed = next_token_log_probabilities(self.ensemble(weights, combine), ids, self.prefixes)
        probabilities = np.exp(mixed.astype(np.float64))
        beyond = self.manifest.tokenizer.vocabulary - len(probabilities)
        return np.pad(probabilities / probabilities.sum(), (0, beyond))

    def serve(self, *, most: int = 16, waiting: int = 256) -> BatchScheduler:
        """Start a scheduler that generates for many requests at once, with continuous batching.

        Args:
            most: Requests that run at once; others wait.
            waiting: Requests that may wait; more are refused.
        """
        return BatchScheduler(self, most=most, waiting=waiting)

    def save_prefixes(self, path: str | Path) -> None:
        """Write the prefix cache to a file, for `load_prefixes` in another process.

        Raises:
            EdgemixError: It cannot be written; an old file is untouched.
        """
        prefix_file.write(Path(path), self.prefixes, self.manifest, self.graphs())

    def load_prefixes(self, path: str | Path) -> int:
        """Begin with the texts of a file, as far as `prefix_bytes` go: how many it had of this bundle's graphs.

        Open only files of your own: what they say was read is taken for it.

        Raises:
            InputError: There is no such file, or it is damaged.
        """
        return prefix_file.read(Path(path), self.prefixes, self.manifest, self.graphs())[0]

    def _stream(self, prompt: list[int], settings: Settings) -> Generator[Chunk]:
        return chunks(decode(self, [prompt], settings, started=time.perf_counter()))


def _required_student(bundle: Path, manifest: Manifest) -> MemberEntry:
    if manifest.student is None:
        raise InputError(
            f"{bundle} has no student",
            "Add student: to its recipe and export it again, or use the mixture itself.",
        )
    return manifest.student
