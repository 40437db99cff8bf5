"""Options of generation, checked before any work starts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from edgemix.errors import InputError
from edgemix.progress import NO_PROGRESS
from edgemix.runtime.decoding.sampling import Sampling
from edgemix.runtime.mixing.arithmetic import Combine, check_combine
from edgemix.runtime.text.grammar import Constraint

if TYPE_CHECKING:
    from typing import Self, SupportsIndex, Unpack

    from edgemix.progress import Progress
    from edgemix.runtime.mixing.ensemble import WeightChoice

Speculation = Literal["auto", "lookup", "student", "off"]


class GenerateOptions(TypedDict, total=False):
    """Options of `generate`, `stream`, `chat` and `stream_chat`, with their defaults.

    Attributes:
        max_new_tokens: 128. Most tokens to generate.
        temperature: 0: the most probable token. Above 0, tokens are sampled; higher values are more random.
        top_k: 0: all tokens. Else only the k most probable ones.
        top_p: 1: all tokens. Else the smallest set of most probable tokens that holds this share.
        min_p: 0: all tokens. Else those at least this share as probable as the most probable one.
        repetition_penalty: 1: none. Above 1, tokens of the text so far become less probable.
        stop: None. A text or texts; generation ends before the first one that appears.
        seed: None: from the system's entropy. An integer for all prompts, or one a prompt; what a prompt yields does
            not depend on the others in its batch, so equal prompts with equal seeds yield equal texts.
        weights: None: as the bundle says, adaptive or fixed. See `WeightChoice`.
        combine: "linear" (weighted mean of probabilities) or "log-linear" (normalized weighted geometric mean).
        speculation: "auto": a text alone is generated in fewer calls, with drafts from the text itself and from
            the bundle's n-grams ("lookup") and from its student ("student"), as long as that is faster; members are
            evaluated only where the result depends on them. The result does not change; with a seed tokens are sampled
            one by one, so that they are the same on every machine. Where this machine has a plan, it says what "auto"
            means. "off": one token after the other, by all members.
        json_schema: None. A JSON schema (or its text) that the text follows, see `grammar`; needs
            edgemix[constrained]. A text that `max_new_tokens` or the context cuts short is incomplete.
        regex: None. A regular expression that the whole text matches.
        choices: None. Texts, one of which is generated.
        attribution: False. True: chunks and completions carry each member's share in every token (`responsibilities`)
            and its log-probability of it (`member_logprobs`); every active member then reads every token.
        progress: None. Progress callback, in tokens of the prompt as members read them.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str] | None
    seed: int | Sequence[int] | None
    weights: WeightChoice
    combine: Combine
    speculation: Speculation
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    attribution: bool
    progress: Progress | None


class ChatOptions(GenerateOptions, total=False):
    """Options of `chat` and `stream_chat`.

    Attributes:
        tools: JSON schemas of functions that the model may call, for chat templates that know of them.
        parse_special: Whether special tokens written in messages control the model; by default they are text.
    """

    tools: Sequence[Mapping[str, Any]] | None
    parse_special: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """`GenerateOptions` with the defaults filled in and checked."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | Sequence[int] | None
    weights: WeightChoice
    combine: Combine
    speculation: Speculation
    constraint: Constraint
    attribution: bool
    progress: Progress

    @classmethod
    def of(cls, **options: Unpack[GenerateOptions]) -> Self:
        """Check options and fill in what is missing.

        Raises:
            InputError: A value is out of its bounds.
            TypeError: There is no such option.
        """
        if unknown := options.keys() - GenerateOptions.__annotations__.keys():
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        default = Sampling()
        sampling = Sampling(
            temperature=options.get("temperature", default.temperature),
            top_k=_whole("top_k", options.get("top_k", default.top_k)),
            top_p=options.get("top_p", default.top_p),
            min_p=options.get("min_p", default.min_p),
            repetition_penalty=options.get("repetition_penalty", default.repetition_penalty),
        )
        max_new_tokens = _whole("max_new_tokens", options.get("max_new_tokens", 128))
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        check_combine(combine := options.get("combine", "linear"))
        speculation = options.get("speculation", "auto")
        if speculation not in get_args(Speculation):
            raise InputError(
                f"speculation={speculation!r} is unknown", f"Choose one of: {', '.join(get_args(Speculation))}."
            )
        if (attribution := options.get("attribution", False)) and combine != "linear":
            raise InputError(
                f"attribution needs the linear mixture; in the {combine} mixture no token comes from one member",
                'Leave one of them out, or choose combine="linear".',
            )
        return cls(
            sampling,
            max_new_tokens,
            _stops(options.get("stop")),
            options.get("seed"),
            options.get("weights"),
            combine,
            speculation,
            Constraint(options.get("json_schema"), options.get("regex"), options.get("choices")),
            attribution,
            options.get("progress") or NO_PROGRESS,
        )

    def seeds(self, prompts: int) -> list[int | None]:
        """Return a seed for each prompt.

        Raises:
            InputError: A negative seed, or not one for each prompt.
        """
        given = list(self.seed) if isinstance(self.seed, Iterable) else [self.seed] * prompts
        seeds = [None if seed is None else _whole("seed", seed) for seed in given]
        if len(seeds) != prompts:
            raise InputError(f"{len(seeds)} seeds for {prompts} prompts", "Give one seed, or one a prompt.")
        if any(seed is not None and seed < 0 for seed in seeds):
            raise InputError("a seed must not be negative")
        return seeds


def _whole(name: str, number: SupportsIndex) -> int:
    """Return a number as an integer; numpy's integers are accepted."""
    try:
        return operator.index(number)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {number!r}") from None


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(stops):
        raise InputError("a stop string must not be empty")
    return stops
