"""A bundle as a model of EleutherAI's lm-evaluation-harness; importing this module registers the model "edgemix".

    import edgemix.cli.lm_eval.model
    lm_eval.simple_evaluate(model="edgemix", model_args="bundle=experts,weights=adaptive", tasks=["lambada_openai"])

It translates between the harness's requests and the runtime. What the harness leaves open is done as in its model for
transformers ("hf"), so that results of both can be compared.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from edgemix import __version__
from edgemix.cli.lm_eval.arguments import ModelArguments, generation_options
from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.runtime import Mixture
    from edgemix.runtime.evaluation.log_likelihood import Continuation

PREFIX_BYTES = 512 << 20
"""Bytes of the prefix cache: many requests begin with the same long examples."""
MAX_GEN_TOKS = 256
"""Default number of tokens to generate, the same as in the harness."""
_logger = logging.getLogger("lm_eval.edgemix")  # a child of the harness's logger, which prints its records


@register_model("edgemix")
class MixtureLM(TemplateLM):  # type: ignore[misc]
    """A mixture as a model of the harness.

    An empty context becomes the beginning-of-text token, or the end-of-text token if the bundle has no other. Texts
    longer than `max_length` are truncated from the left. Decoding is greedy unless a task asks for samples, which are
    seeded by the request's index, so that runs are repeatable.

    Args:
        model_args: See `ModelArguments`.

    Raises:
        InputError: An argument is unknown or out of range; also the errors of `Mixture.load`.
    """

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        arguments = ModelArguments.parse(model_args)
        self._batch_size, self._combine = arguments.texts_per_batch, arguments.combine
        self._weights = arguments.weight_choice

        from edgemix.runtime import Mixture

        self._mixture: Mixture = Mixture.load(
            arguments.bundle,
            arguments.provider,
            arguments.threads,
            student=arguments.student,
            prefix_bytes=PREFIX_BYTES,
        )
        self._ensemble = self._mixture.ensemble(self._weights, self._combine)
        self.max_length: int = min(self._mixture.context, arguments.max_length or self._mixture.context)
        self.max_gen_toks = MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token.

        Raises:
            InputError: The bundle has none.
        """
        tokenizer = self._mixture.tokenizer
        for token in (tokenizer.special_id("eos_token"), *tokenizer.entry.eos):
            if token is not None:
                return token
        raise InputError("this bundle's tokenizer has no end-of-text token to stand for an empty context")

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: the beginning-of-text token, though texts may not begin with
        it, or the end-of-text token.
        """
        tokenizer = self._mixture.tokenizer
        bos = tokenizer.special_id("bos_token") if tokenizer.entry.bos is None else tokenizer.entry.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer and its chat template in the harness's cache of requests."""
        from edgemix.bundle.manifest import CHAT_TEMPLATE

        template = self._mixture.manifest.files.get(CHAT_TEMPLATE)
        return f"edgemix-{self._mixture.tokenizer.entry.sha256}-{template.sha256 if template else 'plain'}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, by default with one beginning-of-text token at the start."""
        tokenizer = self._mixture.tokenizer
        bos = tokenizer.token(tokenizer.entry.bos)
        begin = add_special_tokens is not False and bool(bos)
        if add_special_tokens is None and begin:
            begin = not string.startswith(bos)
        if not string and not begin:
            return []
        return tokenizer.encode(string, bos=begin)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and its continuation, to which the context's last spaces belong.

        A context of spaces counts as an empty one.
        """
        before, after = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], after

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the bundle's chat template if the argument is not empty; a bundle has only one, so a name is ignored.

        Raises:
            InputError: The bundle has none.
        """
        if not chat_template:
            return None
        if self._mixture.tokenizer.chat_template is None:
            raise InputError("this bundle's tokenizer has no chat template", "Leave out --apply_chat_template.")
        return self._mixture.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation, up to the assistant's next answer or to the end of the last message.

        If the template refuses system messages, they are dropped.
        """
        write = self._mixture.tokenizer.write_chat
        try:
            text = write(chat_history, answer=add_generation_prompt)
        except InputError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = write(others, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        place = text.rfind(last) if last in text else text.rfind(last := last.strip())
        return text[: place + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of the model in the harness's results."""
        mixture = self._mixture
        return {
            "edgemix": __version__,
            "members": {entry.name: entry.format for entry in mixture.manifest.members},
            "provider": mixture.provider,
            "max_length": self.max_length,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return, for each continuation, its log-likelihood after its context and whether it is the greedy text."""
        from edgemix.runtime.evaluation.log_likelihood import score_continuations

        answers = [(0.0, False)] * len(requests)
        texts = [self._truncate(context, ids) for _, context, ids in requests]
        truncated = sum(len(text.context) < len(context) for text, (_, context, _) in zip(texts, requests, strict=True))
        if truncated:
            _logger.warning(
                "%d of %d texts have more than %d tokens and are truncated from the left",
                truncated,
                len(texts),
                self.max_length,
            )
        with (
            closing(score_continuations(self._ensemble, texts, padding=True)) as scores,
            progress_bar(len(texts), "loglikelihood", disable_tqdm) as bar,
        ):
            for index, score in scores:
                answers[index] = float(score.log_probabilities.sum()), bool(score.greedy.all())
                if (request := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answers[index])
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts; texts longer than `max_length` are scored in windows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        text_indices: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, ids in map(make_disjoint_window, rolling):
                windows.append((None, context, ids))
                text_indices.append(index)
        totals = [0.0] * len(requests)
        for index, (total, _) in zip(text_indices, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each request; requests with equal options share batches, sorted by prompt."""
        by_options: dict[str, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda i: str(requests[i].args[0])):
            by_options.setdefault(repr(requests[index].args[1]), []).append(index)
        texts = [""] * len(requests)
        with progress_bar(len(requests), "generate_until", disable_tqdm) as bar:
            for indices in by_options.values():
                for start in range(0, len(indices), self._batch_size):
                    batch = indices[start : start + self._batch_size]
                    arguments = [requests[index].args for index in batch]
                    for index, request, text in zip(batch, arguments, self._generate(batch, arguments), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", request, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, indices: Sequence[int], arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return the texts of requests with the same options."""
        from edgemix.runtime.decoding.generate import decode
        from edgemix.runtime.options import Settings

        options, seed = generation_options(arguments[0][1])
        options |= {"weights": self._weights, "combine": self._combine, "seed": [seed + index for index in indices]}
        max_new_tokens = options.setdefault("max_new_tokens", self.max_gen_toks)
        if (room := self.max_length - max_new_tokens) < 1:
            raise InputError(
                f"{max_new_tokens} tokens to generate leave no room for a prompt in {self.max_length} tokens",
                "Ask for fewer: --gen_kwargs max_gen_toks=N.",
            )
        settings = Settings.of(**options)
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context, _ in arguments]
        texts = [""] * len(prompts)
        with closing(decode(self._mixture, prompts, settings, started=time.perf_counter())) as decoded:
            for index, chunk in decoded:
                if chunk.completion is not None:
                    texts[index] = chunk.completion.text
        return texts

    def _truncate(self, context: list[int], ids: list[int]) -> Continuation:
        """Truncate a context from the left so that it fits with its continuation, whose last token is not evaluated."""
        from edgemix.runtime.evaluation.log_likelihood import Continuation

        if len(ids) > self.max_length:
            raise InputError(f"a continuation has {len(ids)} tokens, more than the {self.max_length} that fit")
        return Continuation(context[-(self.max_length + 1 - len(ids)) :], ids)


def progress_bar(total: int, kind: str, disabled: bool) -> Any:
    """Return the harness's progress bar over a number of requests; it shows on a terminal only."""
    return tqdm(total=total, desc=f"Running {kind} requests", disable=disabled or None)  # None: only on a terminal
