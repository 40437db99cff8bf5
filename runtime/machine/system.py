"""This machine's packages, providers, cores, instruction sets and memory.

Nothing here needs ONNX Runtime to be installed: its absence is one of the findings.
"""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec
import psutil

from edgemix import __version__
from edgemix.errors import EdgemixError
from edgemix.runtime.graphs.providers import PROVIDERS, why_not
from edgemix.runtime.processor import Processor, installed_version, processor, read_text

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")
EXTRA_PACKAGES = {"llguidance": "constrained", "altair": "report", "vl-convert-python": "report", "lm-eval": "lm-eval"}
"""Optional packages, and the extra that installs each."""
EXPORT_PACKAGES = ("torch", "transformers", "mobius-onnx", "onnx", "optimum", "peft", "bitsandbytes", "gguf")

_UNLIMITED = 1 << 60  # version 1 of cgroups says "no limit" with a number near 2**63


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


def _memory() -> Memory:
    memory = psutil.virtual_memory()
    limits = [
        read_text(Path(f"/sys/fs/cgroup/{name}")).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")
    ]
    total = min([memory.total, *(int(limit) for limit in limits if limit.isdigit() and int(limit) < _UNLIMITED)])
    return Memory(total=total, available=min(memory.available, total))


def _state(name: str) -> ProviderState:
    try:
        trouble, remedy = why_not(PROVIDERS[name]), PROVIDERS[name].remedy
    except EdgemixError as error:
        trouble, remedy = error.message, error.remedy
    return ProviderState(name, works=not trouble, trouble=trouble, remedy=remedy if trouble else "")
