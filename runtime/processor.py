"""The processor of this machine, and versions of installed packages: what measured settings depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path, PurePosixPath

import msgspec
import psutil

# The flags of /proc/cpuinfo that ONNX Runtime's kernels choose by, from plain to fast.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


class Processor(msgspec.Struct, frozen=True):
    """The CPU.

    Attributes:
        name: As the system calls it.
        physical_cores: Cores of the machine, if known; `logical_cores` counts hardware threads.
        usable_cores: Logical cores that this process may use.
        default_threads: Threads that the runtime uses by default.
        quota: CPUs that its container allows this process; None without a limit.
        instruction_sets: Those relevant to ONNX Runtime; empty where the system does not list them.
    """

    name: str
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    default_threads: int
    instruction_sets: tuple[str, ...]
    quota: float | None = None


def default_threads() -> int:
    """Return the number of physical cores that this process may use: no more than its container's CPU quota, as threads
    that wait for each other use it up, too.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable, usable if quota is None else int(quota)))


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many CPUs the control groups of this process allow it, the smallest of a group and those around it.

    Args:
        groups: Where control groups are mounted, of version 1 or 2.
        own: The groups of this process.

    Returns:
        CPUs; None without a limit.
    """
    found = []
    lines = [line.split(":", 2) for line in read_text(own).splitlines() if line.count(":") >= 2] or [["0", "", "/"]]
    for _, controllers, path in [*lines, ["0", "", "/"], ["0", "cpu", "/"]]:
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            if not controllers:
                quota, _, period = read_text(groups / folder / "cpu.max").strip().partition(" ")
            elif "cpu" in controllers.split(","):
                # The controller's name is a link where it is mounted together with others.
                quota = read_text(groups / "cpu" / folder / "cpu.cfs_quota_us").strip()
                period = read_text(groups / "cpu" / folder / "cpu.cfs_period_us").strip()
            else:
                continue
            if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # "max" and -1 are no limit
                found.append(int(quota) / int(period))
    return min(found, default=None)


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
    name, instruction_sets = parse_cpuinfo(read_text(Path("/proc/cpuinfo")))
    logical = psutil.cpu_count() or 1
    return Processor(
        name=name or platform.processor() or platform.machine() or "unknown",
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        default_threads=default_threads(),
        instruction_sets=instruction_sets,
        quota=cpu_quota(),
    )


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_text(path: Path) -> str:
    """Return the file's text; empty where there is no file (another system)."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
