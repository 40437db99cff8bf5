"""A bundle as a model of EleutherAI's lm-evaluation-harness: importing this module registers it there as "edgemix".

    import edgemix.cli.lm_eval.model
    lm_eval.simple_evaluate(model="edgemix", model_args="bundle=experts,weights=adaptive", tasks=["lambada_openai"])

A front end, as the command line is: it translates between the harness's requests and the runtime. Where the harness
leaves room, it does what the harness's own model of transformers ("hf") does, so that figures of both can be compared.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from edgemix import __version__
from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemix.runtime import GenerateOptions, Mixture, WeightChoice
    from edgemix.runtime.evaluation.log_likelihood import Continuation

PREFIX_BYTES = 512 << 20
"""Memory for texts that were read: many requests begin with the same long examples."""
MAX_GEN_TOKS = 256
"""Tokens to generate, unless a task says otherwise: the harness's number."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of tokens to generate, the first one that is there counts."""
_SAMPLING = frozenset({"top_k", "top_p", "min_p", "repetition_penalty"})
_logger = logging.getLogger("lm_eval.edgemix")  # below the harness's logger, which shows what it hears


class ModelArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `--model_args` may say, and what the harness's own options add.

    Attributes:
        bundle: Its folder.
        weights: A domain's name, "adaptive", or "math:0.5;code:0.5" (a mapping, from Python).
        combine, student, provider, threads: As in `Mixture`.
        max_length: Most tokens of a text; the context by default, and at most.
        batch_size: Texts that are generated at once; one alone takes fewer calls a token.
        max_batch_size, device: The harness's, which always says something; `provider` is what counts.
    """

    bundle: Path
    weights: str | dict[str, float] | None = None
    combine: Literal["linear", "log-linear"] = "linear"
    student: bool = False
    provider: str = "auto"
    threads: int | None = None
    max_length: int | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    device: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Check what was given.

        Raises:
            InputError: A name is unknown, the bundle is missing, or a value makes no sense.
        """
        try:
            arguments = msgspec.convert(given, cls, strict=False, dec_hook=lambda kind, value: kind(value))
        except (msgspec.ValidationError, TypeError) as error:
            known = [name for name in cls.__struct_fields__ if name not in ("batch_size", "max_batch_size", "device")]
            raise InputError(f"model_args: {error}", f"It takes {', '.join(known)}; bundle must be there.") from None
        if arguments.student and arguments.weights is not None:
            raise InputError(
                "model_args: weights mix the members, and student=true leaves them out", "Give one of the two."
            )
        if arguments.max_length is not None and arguments.max_length < 2:
            raise InputError(f"model_args: max_length must be at least 2, not {arguments.max_length}")
        return arguments

    @property
    def choice(self) -> WeightChoice:
        """The weights as the runtime takes them.

        Raises:
            InputError: They are not NAME:NUMBER pairs.
        """
        if not isinstance(self.weights, str) or ":" not in self.weights:
            return self.weights
        pairs = [part.rpartition(":") for part in self.weights.split(";") if part.strip()]
        try:
            weights = {name.strip(): float(number) for name, _, number in pairs}
        except ValueError:
            weights = {}
        if len(weights) < len(pairs) or "" in weights:
            raise InputError(
                f"model_args: weights={self.weights} are not NAME:NUMBER pairs, each name once",
                "Write them like weights=math:0.5;code:0.5, in quotes.",
            )
        return weights

    @property
    def batch(self) -> int:
        """Texts that are generated at once; "auto" is one.

        Raises:
            InputError: It is no number above zero.
        """
        size = str(self.batch_size)
        if size.startswith("auto"):
            return 1
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f'--batch_size must be a number above zero or "auto", not {size}')
        return int(size)


@register_model("edgemix")
class MixtureLM(TemplateLM):  # type: ignore[misc]
    """A mixture that answers the harness's requests.

    An empty context is the bundle's beginning-of-text token, or its end-of-text token where texts begin with none. What
    is longer than `max_length` loses its beginning. Greedy unless a task asks for samples, which are seeded by a
    request's number, so that a run can be repeated.

    Args:
        model_args: See `ModelArguments`.

    Raises:
        InputError: An argument makes no sense; as `Mixture.load`.
    """

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        arguments = ModelArguments.of(model_args)
        self._batch, self._weights, self._combine = arguments.batch, arguments.choice, arguments.combine

        from edgemix.runtime import Mixture

        self._mixture: Mixture = Mixture.load(
            arguments.bundle,
            arguments.provider,
            arguments.threads,
            student=arguments.student,
            prefix_bytes=PREFIX_BYTES,
        )
        self._blend = self._mixture.blend(self._weights, self._combine)
        self.max_length: int = min(self._mixture.context, arguments.max_length or self._mixture.context)
        self.max_gen_toks = MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token.

        Raises:
            InputError: The bundle has none.
        """
        for token in self._mixture.tokenizer.entry.eos:
            return token
        raise InputError("this bundle's tokenizer has no end-of-text token to stand for an empty context")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self._mixture.tokenizer.entry.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers and their chat templates apart, for the harness's cache of requests."""
        from edgemix.bundle.manifest import CHAT_TEMPLATE

        template = self._mixture.manifest.files.get(CHAT_TEMPLATE)
        return f"edgemix-{self._mixture.tokenizer.entry.sha256}-{template.sha256 if template else 'plain'}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, perhaps none; by default with a beginning-of-text token before them, unless the text has one."""
        tokenizer = self._mixture.tokenizer
        bos = tokenizer.token(tokenizer.entry.bos)
        begin = add_special_tokens is not False and bool(bos)
        if add_special_tokens is None and begin:
            begin = not string.startswith(bos)
        if not string and not begin:
            return []
        return tokenizer.encode(string, bos=begin)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The bundle's chat template, if one is to be used; it has only one, whatever its name.

        Raises:
            InputError: It has none.
        """
        if not chat_template:
            return None
        if self._mixture.tokenizer.chat_template is None:
            raise InputError("this bundle's tokenizer has no chat template", "Leave out --apply_chat_template.")
        return self._mixture.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text: up to the assistant's answer, or to the end of its last message, which goes on.

        A template that refuses it is asked again without the system's messages.
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
        """What the harness writes down of the model."""
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
        """Log-likelihood of every second list of token ids behind the first one, and whether it is the greedy text."""
        from edgemix.runtime.evaluation.log_likelihood import score_continuations

        answers = [(0.0, False)] * len(requests)
        texts = [self._fitting(context, ids) for _, context, ids in requests]
        cut = sum(len(text.context) < len(context) for text, (_, context, _) in zip(texts, requests, strict=True))
        if cut:
            _logger.warning(
                "%d of %d texts have more than %d tokens: they lose the first", cut, len(texts), self.max_length
            )
        with (
            closing(score_continuations(self._blend, texts)) as scores,
            bar_of(len(texts), "loglikelihood", disable_tqdm) as bar,
        ):
            for index, score in scores:
                answers[index] = float(score.log_probabilities.sum()), bool(score.greedy.all())
                if (asked := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answers[index])
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; one longer than `max_length` in windows of that, each as full as it can be."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, ids in map(make_disjoint_window, rolling):
                windows.append((None, context, ids))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for every request; requests with the same options in batches, those that begin alike together."""
        alike: dict[str, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda i: str(requests[i].args[0])):
            alike.setdefault(repr(requests[index].args[1]), []).append(index)
        texts = [""] * len(requests)
        with bar_of(len(requests), "generate_until", disable_tqdm) as bar:
            for indices in alike.values():
                for start in range(0, len(indices), self._batch):
                    batch = indices[start : start + self._batch]
                    arguments = [requests[index].args for index in batch]
                    for index, asked, text in zip(batch, arguments, self._generate(batch, arguments), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", asked, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, numbers: Sequence[int], arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The texts of requests with the same options."""
        from edgemix.runtime.decoding.generate import decode
        from edgemix.runtime.options import Settings

        options, seed = generation_options(arguments[0][1])
        options |= {"weights": self._weights, "combine": self._combine, "seed": [seed + number for number in numbers]}
        most = options.setdefault("max_new_tokens", self.max_gen_toks)
        if (room := self.max_length - most) < 1:
            raise InputError(
                f"{most} tokens to generate leave no room for a prompt in {self.max_length} tokens",
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

    def _fitting(self, context: list[int], ids: list[int]) -> Continuation:
        """The end of a context that fits before a continuation, whose last token is never read."""
        from edgemix.runtime.evaluation.log_likelihood import Continuation

        if len(ids) > self.max_length:
            raise InputError(f"a continuation has {len(ids)} tokens, more than the {self.max_length} that fit")
        return Continuation(context[-(self.max_length + 1 - len(ids)) :], ids)


def bar_of(total: int, kind: str, disabled: bool) -> Any:
    """The harness's bar of so many requests, on a terminal only."""
    return tqdm(total=total, desc=f"Running {kind} requests", disable=disabled or None)  # None: if there is a terminal


def generation_options(generation_kwargs: Mapping[str, Any]) -> tuple[GenerateOptions, int]:
    """A task's `generation_kwargs` as the runtime's options, and the seed.

    Raises:
        InputError: One is unknown here.
    """
    rest = dict(generation_kwargs)
    until = rest.pop("until", None) or ()
    lengths = [length for name in _LENGTHS if (length := rest.pop(name, None)) is not None]
    sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if sample is None:
        sample = bool(temperature)
    seed = int(rest.pop("seed", 0))
    if rest.get("num_beams") == 1:
        del rest["num_beams"]
    if unknown := rest.keys() - _SAMPLING:
        raise InputError(
            f"generation_kwargs: {', '.join(sorted(unknown))} cannot be had here",
            f"Known: until, {_LENGTHS[0]}, do_sample, temperature, seed, {', '.join(sorted(_SAMPLING))}.",
        )
    options: GenerateOptions = {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": (1.0 if temperature is None else float(temperature)) if sample else 0.0,
        **rest,  # type: ignore[typeddict-item]
    }
    if lengths:
        options["max_new_tokens"] = int(lengths[0])
    return options, seed
