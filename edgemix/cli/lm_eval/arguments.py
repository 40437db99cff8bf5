"""The arguments of the harness's command line as the runtime's: `--model_args` and a task's `generation_kwargs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemix.runtime import GenerateOptions, WeightChoice

_HARNESS_FIELDS = ("batch_size", "max_batch_size", "device")
"""Fields of `ModelArguments` that the harness sets itself."""
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The keys by which tasks name the number of tokens to generate; the first one that is present counts."""
_SAMPLING_KEYS = frozenset({"top_k", "top_p", "min_p", "repetition_penalty"})


class ModelArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of `--model_args`, and those that the harness adds.

    Attributes:
        bundle: The bundle's folder.
        weights: A domain's name, "adaptive", or "math:0.5;code:0.5"; from Python also a mapping.
        combine, student, provider, threads: The same as in `Mixture`.
        max_length: Maximum tokens of a text; the context by default, and at most.
        batch_size: Texts that are generated at once: a number or "auto", which is one. A single text takes fewer calls
            per token.
        max_batch_size, device: Set by the harness and ignored; use `provider`.
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
    def parse(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Convert and check the harness's arguments.

        Raises:
            InputError: A name is unknown, the bundle is missing, or a value has the wrong type or is out of range.
        """
        try:
            arguments = msgspec.convert(given, cls, strict=False, dec_hook=lambda kind, value: kind(value))
        except (msgspec.ValidationError, TypeError) as error:
            known = [name for name in cls.__struct_fields__ if name not in _HARNESS_FIELDS]
            raise InputError(
                f"model_args: {error}", f"Known arguments: {', '.join(known)}; bundle is required."
            ) from None
        if arguments.student and arguments.weights is not None:
            raise InputError("model_args: weights mix the members, and student=true leaves them out", "Give only one.")
        if arguments.max_length is not None and arguments.max_length < 2:
            raise InputError(f"model_args: max_length must be at least 2, not {arguments.max_length}")
        return arguments

    @property
    def weight_choice(self) -> WeightChoice:
        """The weights in the runtime's form.

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
    def texts_per_batch(self) -> int:
        """The batch size as a number.

        Raises:
            InputError: It is neither "auto" nor a number above zero.
        """
        size = str(self.batch_size)
        if size.startswith("auto"):
            return 1
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f'--batch_size must be a number above zero or "auto", not {size}')
        return int(size)


def generation_options(generation_kwargs: Mapping[str, Any]) -> tuple[GenerateOptions, int]:
    """Return a task's `generation_kwargs` as the runtime's options, and the seed.

    Raises:
        InputError: A key is unknown.
    """
    rest = dict(generation_kwargs)
    until = rest.pop("until", None) or ()
    lengths = [length for name in _LENGTH_KEYS if (length := rest.pop(name, None)) is not None]
    sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if sample is None:
        sample = bool(temperature)
    seed = int(rest.pop("seed", 0))
    if rest.get("num_beams") == 1:
        del rest["num_beams"]
    if unknown := rest.keys() - _SAMPLING_KEYS:
        raise InputError(
            f"generation_kwargs: {', '.join(sorted(unknown))} is not supported",
            f"Known: until, {_LENGTH_KEYS[0]}, do_sample, temperature, seed, {', '.join(sorted(_SAMPLING_KEYS))}.",
        )
    options: GenerateOptions = {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": (1.0 if temperature is None else float(temperature)) if sample else 0.0,
        **rest,  # type: ignore[typeddict-item]
    }
    if lengths:
        options["max_new_tokens"] = int(lengths[0])
    return options, seed
