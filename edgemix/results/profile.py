"""What `edgemix profile` measures of a bundle on one machine: the file that it writes, and that reports and comparisons
read.

Times are seconds, sizes bytes, rates tokens a second, unless a name says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgemix.errors import InputError, storage_errors

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
MAX_BYTES = 64 << 20
"""Of a profile's file; a real one has some ten thousand."""
_MAKE_ONE = "Make one: edgemix profile BUNDLE -o FILE"
SubjectKind = Literal["member", "student", "mixture"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part: immutable, and an unknown key is an error."""


class Quantiles(_Record, frozen=True):
    """A figure that was measured several times.

    Attributes:
        p50, p90, p99: Of what was measured; with few measurements the higher ones are the largest.
        spread: Interquartile range over the median.
        count: Measurements.
        steady: Whether the median can be believed: rounds that were measured at other times agree on it. What was not
            steady was measured again, in vain.
    """

    p50: float
    p90: float
    p99: float
    spread: float
    count: int
    steady: bool = True


class Machine(_Record, frozen=True):
    """Where it ran. `memory` is in bytes; rates are what this machine reached when it did nothing else.

    Attributes:
        processor: As the system calls it.
        cores: Physical cores that the process may use.
        instruction_sets: Those that matter here.
        memory: Main memory.
        platform: Operating system and architecture.
        provider: Where graphs ran.
        threads: Within an operator.
        onnxruntime, edgemix: Versions.
        bandwidth: Bytes a second that all threads read from memory.
        fp32_peak, int8_peak: Multiply-adds a second of large products; None where the provider has no such product.
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
    """Loading the members (and what drafts for them), each time in a process of its own.

    Attributes:
        cold: With the files not in the file cache; None where the system has no way to drop them.
        warm: With the files in the file cache.
        resident: Memory that loading adds and keeps.
        peak: The most that the process held while it loaded and then generated.
        files: Of the bundle.
    """

    warm: Quantiles
    resident: int
    peak: int
    files: int
    cold: Quantiles | None = None


class Prefill(_Record, frozen=True):
    """Time to first token of a prompt of so many tokens."""

    tokens: int
    ttft: Quantiles


class Decode(_Record, frozen=True):
    """Time per output token behind so many tokens of context."""

    context: int
    tpot: Quantiles


class Batch(_Record, frozen=True):
    """So many texts at once: tokens a second of all of them, decoding."""

    size: int
    rate: Quantiles


class Speculation(_Record, frozen=True):
    """What generating in fewer calls brings.

    Attributes:
        acceptance: Share of drafted tokens that were taken; None where nothing was drafted.
        drafted: Tokens drafted, for each token written.
        calls: Calls of members' graphs for each token written; the plain loop has one a member.
        speedup: Plain time per token over this one's, both taken in turns.
    """

    acceptance: float | None
    drafted: float
    calls: float
    speedup: float


class Operator(_Record, frozen=True):
    """Time of one operator type, in one call of a subject's graphs: a prompt (`prefill`) or a token (`decode`)."""

    type: str
    count: int
    prefill: float
    decode: float


class Layer(_Record, frozen=True):
    """Time of one part of the model in one call: "layer 0" ..., "embedding", "head", "other"."""

    name: str
    prefill: float
    decode: float


class Breakdown(_Record, frozen=True):
    """Where the time of one graph goes, by ONNX Runtime's own profiler, which itself takes some.

    Attributes:
        graph: The member's name; the student's.
        prompt: Tokens of the prefill call.
        prefill, decode: Time of one whole call.
    """

    graph: str
    prompt: int
    prefill: float
    decode: float
    operators: tuple[Operator, ...]
    layers: tuple[Layer, ...]


class Outside(_Record, frozen=True):
    """Time for each token written that is not spent in ONNX Runtime.

    Attributes:
        tokenizer: Decoding tokens to text.
        mixing: Softmax and weighted sums.
        sampling: Choosing the token.
        other: What is left: bindings, bookkeeping, drafts from the text.
        encode: Encoding a prompt, for each of its tokens.
    """

    tokenizer: float
    mixing: float
    sampling: float
    other: float
    encode: float


class Roof(_Record, frozen=True):
    """How far one phase is from what the machine allows.

    Attributes:
        phase: "prefill" or "decode".
        bytes: Read from memory in a call, at least: weights, and keys and values.
        operations: Multiply-adds of a call.
        tokens: Of the call.
        floor: The least time that a call could take: the larger of both limits.
        bound: Which one that is.
        seconds: What the call took.
    """

    phase: Literal["prefill", "decode"]
    bytes: int
    operations: int
    tokens: int
    floor: float
    bound: Literal["memory", "compute"]
    seconds: float


class Energy(_Record, frozen=True):
    """Joules for each token written, of what the counter counts ("package-0", "NVIDIA ...")."""

    counter: str
    joules: float


class Subject(_Record, frozen=True):
    """One thing that generates: a member alone, the student alone, the mixture plainly, the mixture in fewer calls.

    Attributes:
        name: "math", "student", "mixture, plain", "mixture".
        kind: What the name is a name of.
        format: Of its weights; of a mixture's members, those there are, with commas.
        files: Bytes of its files; of a mixture's members, all of them.
        prefill, decode, batches: By prompt length, by context, by batch size.
        speculation: Of the mixture in fewer calls.
        roofs: Of graphs whose size is known.
        outside: Where it was measured.
        energy: Where the machine tells it.
        loading: Of a member or the student alone; the profile's own is that of the mixture.
    """

    name: str
    kind: SubjectKind
    format: str
    files: int
    prefill: tuple[Prefill, ...] = ()
    decode: tuple[Decode, ...] = ()
    batches: tuple[Batch, ...] = ()
    speculation: Speculation | None = None
    roofs: tuple[Roof, ...] = ()
    outside: Outside | None = None
    energy: Energy | None = None
    loading: Loading | None = None

    @property
    def rate(self) -> float | None:
        """Tokens a second of decoding behind the shortest context that was measured."""
        return 1 / self.decode[0].tpot.p50 if self.decode else None


class Variant(_Record, frozen=True):
    """One way to run the mixture here, and its time per output token.

    Attributes:
        ttft: Of the prompt before those tokens.
        chosen: Whether it is the plan that was written for this machine.
    """

    threads: int
    provider: str
    speculation: str
    tpot: Quantiles
    ttft: Quantiles | None = None
    chosen: bool = False


class Profile(_Record, frozen=True):
    """All of it.

    Attributes:
        bundle: The folder's name.
        digest: sha256 of its manifest: of which bundle this is a profile.
        created: When, ISO 8601 in UTC.
        quick: Whether it was measured in a hurry.
        seconds: How long measuring took.
        notes: What a reader must know: figures that are not steady, what could not be measured and why.
        weights: How the mixture's members were weighed, as `--weights` says it; empty for the bundle's own weights.
    """

    bundle: str
    digest: str
    created: str
    quick: bool
    seconds: float
    machine: Machine
    loading: Loading
    subjects: tuple[Subject, ...]
    breakdowns: tuple[Breakdown, ...] = ()
    variants: tuple[Variant, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str = ""
    schema: int = SCHEMA

    def subject(self, name: str) -> Subject:
        """By its name.

        Raises:
            KeyError: There is none.
        """
        for subject in self.subjects:
            if subject.name == name:
                return subject
        raise KeyError(name)


def read_profile(path: Path) -> Profile:
    """A profile from a file.

    Raises:
        InputError: There is no such file, or it is no profile that this version reads.
        EdgemixError: It cannot be read.
    """
    with storage_errors(f"reading {path}"):
        if not path.is_file():
            raise InputError(f"there is no profile {path}", _MAKE_ONE)
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is no profile: it has more than {MAX_BYTES:,} bytes", _MAKE_ONE)
        data = path.read_bytes()
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
        if found.get("schema") != SCHEMA:
            raise InputError(
                f"{path} is no profile that this edgemix reads (schema {found.get('schema')!r}, not {SCHEMA})",
                "Make it again: edgemix profile BUNDLE -o FILE",
            )
        return msgspec.convert(found, Profile)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{path} is no profile: {error}", _MAKE_ONE) from None


def encode_profile(profile: Profile) -> bytes:
    """The file's bytes: JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
