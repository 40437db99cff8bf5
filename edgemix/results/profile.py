"""The measurements of a bundle on one machine, as `edgemix profile` writes and comparisons and reports read them.

Times are in seconds, sizes in bytes, rates in tokens per second, unless a name says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
MAX_BYTES = 64 << 20
"""Maximum size of a profile's file; real ones have some ten thousand bytes."""
_REMEDY = "Make one: edgemix profile BUNDLE -o FILE"
TargetKind = Literal["member", "student", "mixture"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base class of all parts: immutable, and an unknown key is an error."""


class Quantiles(_Record, frozen=True):
    """Quantiles of repeated measurements.

    Attributes:
        p50, p90, p99: The quantiles; with few measurements the higher ones are the maximum.
        spread: Interquartile range divided by the median.
        count: Number of measurements.
        stable: Whether rounds at different times agree on the median. Measurements that were not stable were repeated.
    """

    p50: float
    p90: float
    p99: float
    spread: float
    count: int
    stable: bool = msgspec.field(default=True, name="steady")


class Machine(_Record, frozen=True):
    """The machine and its settings; rates were measured when it was otherwise idle.

    Attributes:
        processor: The processor's name.
        cores: Physical cores that the process may use.
        instruction_sets: The instruction sets that matter for these graphs.
        memory: Main memory in bytes.
        platform: Operating system and architecture.
        provider: The execution provider.
        threads: Threads within an operator.
        onnxruntime, edgemix: Versions.
        bandwidth: Memory bandwidth of all threads, in bytes per second.
        fp32_peak, int8_peak: Multiply-adds per second of large matrix products; None if the provider has no such
            product.
    """

    processor: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory: int
    platform: str
    provider: str
    threads: int
    onnxruntime: str
    edgemix: str
    bandwidth: float | None = None
    fp32_peak: float | None = None
    int8_peak: float | None = None


class Loading(_Record, frozen=True):
    """Times and memory of loading the members and their draft model, each time in a new process.

    Attributes:
        warm: Time with the files in the page cache.
        resident: Memory that loading adds and keeps.
        peak: Peak memory of the process while it loaded and then generated.
        files: Size of the bundle's files.
        cold: Time with the files not in the page cache; None if the system cannot drop them.
    """

    warm: Quantiles
    resident: int
    peak: int
    files: int
    cold: Quantiles | None = None


class Prefill(_Record, frozen=True):
    """Time to first token for a prompt of `tokens` tokens."""

    tokens: int
    ttft: Quantiles


class Decode(_Record, frozen=True):
    """Time per output token after `context` tokens."""

    context: int
    tpot: Quantiles


class Batch(_Record, frozen=True):
    """Tokens per second of decoding a whole batch of `size` texts."""

    size: int
    rate: Quantiles


class SpeculationResult(_Record, frozen=True):
    """The effect of speculative decoding.

    Attributes:
        acceptance: Accepted share of draft tokens; None if nothing was drafted.
        drafted: Draft tokens per output token.
        calls: Calls of members' graphs per output token; the plain loop has one per member.
        speedup: Time per token of the plain loop divided by that of speculative decoding, measured alternately.
    """

    acceptance: float | None
    drafted: float
    calls: float
    speedup: float


class Operator(_Record, frozen=True):
    """Time of one operator type in one call of a graph: a prompt (`prefill`) or a token (`decode`)."""

    type: str
    count: int
    prefill: float
    decode: float


class LayerTime(_Record, frozen=True):
    """Time of one part of the model in one call: "layer 0" ..., "embedding", "head", "other"."""

    name: str
    prefill: float
    decode: float


class Breakdown(_Record, frozen=True):
    """Time of one graph by operator and layer, measured by ONNX Runtime's profiler, which adds some overhead.

    Attributes:
        graph: The name of the member or of the student.
        prompt: Tokens of the prefill call.
        prefill, decode: Time of one whole call.
        operators: Times by operator type.
        layers: Times by part of the model.
    """

    graph: str
    prompt: int
    prefill: float
    decode: float
    operators: tuple[Operator, ...]
    layers: tuple[LayerTime, ...]


class Overhead(_Record, frozen=True):
    """Time per output token that is spent outside ONNX Runtime.

    Attributes:
        tokenizer: Decoding tokens to text.
        mixing: Softmax and weighted sums.
        sampling: Choosing the token.
        other: All other work: bindings, bookkeeping, drafts from the text.
        encode: Encoding a prompt, per prompt token.
    """

    tokenizer: float
    mixing: float
    sampling: float
    other: float
    encode: float


class RooflinePoint(_Record, frozen=True):
    """One call of a phase against the machine's limits.

    Attributes:
        phase: "prefill" or "decode".
        bytes: Bytes read from memory per call, at least: weights, keys and values.
        operations: Multiply-adds per call.
        tokens: Tokens per call.
        floor: Lower bound of the call's time, by memory bandwidth or by arithmetic.
        bound: The limit that gives this lower bound.
        seconds: Measured time of the call.
    """

    phase: Literal["prefill", "decode"]
    bytes: int
    operations: int
    tokens: int
    floor: float
    bound: Literal["memory", "compute"]
    seconds: float


class Energy(_Record, frozen=True):
    """Joules per output token, by the counter of that name ("package-0", "NVIDIA ...")."""

    counter: str
    joules: float


class TargetResult(_Record, frozen=True):
    """The measurements of one target: a member, the student, or the mixture with or without speculative decoding.

    Attributes:
        name: A member's name, "student", "mixture, plain" (the plain loop) or "mixture".
        kind: The kind of target.
        format: Weight format; of a mixture, those of its members, with commas.
        files: Size of its files; of a mixture, of all members' files.
        prefill, decode, batches: Measurements by prompt length, by context length, by batch size.
        speculation: The effect of speculative decoding; None if it was not used.
        roofline: Its calls against the machine's limits, for graphs of known size.
        overhead: Time outside ONNX Runtime; None if not measured.
        energy: None if the machine has no counter.
        loading: Of a member or the student alone; `Profile.loading` is that of the mixture.
    """

    name: str
    kind: TargetKind
    format: str
    files: int
    prefill: tuple[Prefill, ...] = ()
    decode: tuple[Decode, ...] = ()
    batches: tuple[Batch, ...] = ()
    speculation: SpeculationResult | None = None
    roofline: tuple[RooflinePoint, ...] = msgspec.field(default=(), name="roofs")
    overhead: Overhead | None = msgspec.field(default=None, name="outside")
    energy: Energy | None = None
    loading: Loading | None = None

    @property
    def rate(self) -> float | None:
        """Decoded tokens per second after the shortest measured context."""
        return 1 / self.decode[0].tpot.p50 if self.decode else None


class Variant(_Record, frozen=True):
    """One configuration of the mixture on this machine, and its time per output token.

    Attributes:
        threads: Threads within an operator.
        provider: The execution provider.
        speculation: Where drafts come from: "auto", "lookup", "student" or "off".
        tpot: Time per output token.
        ttft: Time to first token of the prompt before.
        chosen: Whether it is the saved plan for this machine.
    """

    threads: int
    provider: str
    speculation: str
    tpot: Quantiles
    ttft: Quantiles | None = None
    chosen: bool = False


class Profile(_Record, frozen=True):
    """All measurements of a bundle on one machine.

    Attributes:
        bundle: The folder's name.
        digest: SHA-256 of the bundle's manifest.
        created: Time of the measurement, ISO 8601 in UTC.
        quick: Whether it was measured with --quick.
        seconds: Duration of the measurement.
        machine: The machine.
        loading: Loading of the whole bundle.
        results: The measurements of each target.
        breakdowns: Each graph's time by operator and layer.
        variants: The configurations that --recommend measured.
        notes: Measurements that are not stable, or could not be made and why.
        weights: The members' weights in the form of `--weights`; empty for the bundle's own weights.
        schema: Version of the file's format.
    """

    bundle: str
    digest: str
    created: str
    quick: bool
    seconds: float
    machine: Machine
    loading: Loading
    results: tuple[TargetResult, ...] = msgspec.field(name="subjects")
    breakdowns: tuple[Breakdown, ...] = ()
    variants: tuple[Variant, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str = ""
    schema: int = SCHEMA

    def result(self, name: str) -> TargetResult:
        """Return the result of the target of that name.

        Raises:
            KeyError: There is none.
        """
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)


def read_profile(path: Path) -> Profile:
    """Read a profile from a file.

    Raises:
        InputError: There is no such file, or this version cannot read it.
        EdgemixError: Reading fails.
    """
    with storage_errors(f"reading {path}"):
        if not path.is_file():
            raise InputError(f"there is no profile {path}", _REMEDY)
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is not a profile: it has more than {MAX_BYTES:,} bytes", _REMEDY)
        data = path.read_bytes()
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
        if found.get("schema") != SCHEMA:
            raise InputError(
                f"{path} is not a profile that this edgemix reads (schema {found.get('schema')!r}, not {SCHEMA})",
                "Make it again: edgemix profile BUNDLE -o FILE",
            )
        return msgspec.convert(found, Profile)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{path} is not a profile: {error}", _REMEDY) from None


def encode_profile(profile: Profile) -> bytes:
    """Return the file's bytes: indented JSON."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
