"""This machine's packages, providers, cores, instruction sets and memory.

Nothing here needs ONNX Runtime to be installed: its absence is one of the findings.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from edgemix import __version__
from edgemix.errors import EdgemixError
from edgemix.runtime.graphs.providers import PROVIDERS, default_threads, why_not

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")
EXTRA_PACKAGES = {"llguidance": "constrained", "altair": "report", "vl-convert-python": "report", "lm-eval": "lm-eval"}
"""Optional packages, and the extra that installs each."""
EXPORT_PACKAGES = ("torch", "transformers", "mobius-onnx", "onnx", "optimum", "peft", "bitsandbytes", "gguf")

# The flags of /proc/cpuinfo that ONNX Runtime's kernels choose by, from plain to fast.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_UNLIMITED = 1 << 60  # version 1 of cgroups says "no limit" with a number near 2**63


class Processor(msgspec.Struct, frozen=True):
    """The CPU.

    Attributes:
        name: As the system calls it.
        physical_cores: Cores of the machine, if known; `logical_cores` counts hardware threads.
        usable_cores: Logical cores that this process may use.
        default_threads: Threads that the runtime uses by default.
        instruction_sets: Those relevant to ONNX Runtime; empty where the system does not list them.
    """

    name: str
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    default_threads: int
    instruction_sets: tuple[str, ...]


class Memory(msgspec.Struct, frozen=True):
    """Main memory in bytes. `total` is the container's limit where that is lower than the machine's memory."""

    total: int
    available: int


class ProviderState(msgspec.Struct, frozen=True):
    """Whether a provider works here, and if not, why and what to do."""

    name: str
    works: bool
    trouble: str = ""
    remedy: str = ""


class System(msgspec.Struct, frozen=True):
    """The whole description. `packages` maps a distribution to its version, None where it is not installed."""

    edgemix: str
    python: str
    platform: str
    processor: Processor
    memory: Memory
    providers: tuple[ProviderState, ...]
    packages: dict[str, str | None]

    @property
    def can_run(self) -> bool:
        """Whether bundles can run here: some provider works."""
        return any(provider.works for provider in self.providers)

    @property
    def can_export(self) -> bool:
        """Whether every package that `edgemix export` needs is installed."""
        return self.can_run and all(self.packages[name] for name in EXPORT_PACKAGES)


def describe() -> System:
    """Describe this machine; runs a tiny graph on each provider."""
    return System(
        edgemix=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor(),
        memory=_memory(),
        providers=tuple(_state(name) for name in PROVIDERS),
        packages={name: installed_version(name) for name in (*RUNTIME_PACKAGES, *EXPORT_PACKAGES, *EXTRA_PACKAGES)},
    )


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the name and instruction sets of a processor from the text of /proc/cpuinfo; empty if absent."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", ""), tuple(name for name in _INSTRUCTION_SETS if name in flags)


def processor() -> Processor:
    """Describe the CPU on which this process runs."""
    name, instruction_sets = parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    logical = psutil.cpu_count() or 1
    return Processor(
        name=name or platform.processor() or platform.machine() or "unknown",
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        default_threads=default_threads(),
        instruction_sets=instruction_sets,
    )


def _memory() -> Memory:
    memory = psutil.virtual_memory()
    limits = [_read(Path(f"/sys/fs/cgroup/{name}")).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")]
    total = min([memory.total, *(int(limit) for limit in limits if limit.isdigit() and int(limit) < _UNLIMITED)])
    return Memory(total=total, available=min(memory.available, total))


def _state(name: str) -> ProviderState:
    try:
        trouble, remedy = why_not(PROVIDERS[name]), PROVIDERS[name].remedy
    except EdgemixError as error:
        trouble, remedy = error.message, error.remedy
    return ProviderState(name, works=not trouble, trouble=trouble, remedy=remedy if trouble else "")


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    """Return the file's text; empty where there is no file (another system)."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
