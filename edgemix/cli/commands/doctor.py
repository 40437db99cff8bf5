"""`edgemix doctor`: check whether this machine can run and export bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemix.cli.command import command

if TYPE_CHECKING:
    from edgemix.cli.console import Console
    from edgemix.runtime.machine.system import System


@command("doctor", example="edgemix doctor\nedgemix doctor --json")
def doctor(console: Console) -> None:
    """Show whether this machine can run and export bundles.

    Lists versions, execution providers, cores, instruction sets and memory.

    The exit code is 0 even if something is missing; see "can_run" and "can_export" in the output of --json.
    """
    from edgemix.runtime.machine import system

    found = system.describe()
    if console.as_json:
        import msgspec

        summary = {"can_run": found.can_run, "can_export": found.can_export}
        console.document({**msgspec.to_builtins(found), **summary})
        return
    console.table("Machine", ("", ""), _machine(found), left=2)
    console.table("Providers", ("Provider", "Works", "Why not"), _providers(found), left=3)
    console.table("Packages", ("Package", "Version"), _packages(found), left=2)
    console.line(_summary(found))


def _machine(found: System) -> list[tuple[str, str]]:
    processor, memory = found.processor, found.memory
    cores = f"{processor.physical_cores or 'unknown'} physical, {processor.logical_cores} logical"
    quota = "" if processor.quota is None else f", {processor.quota:g} by the container's quota"
    return [
        ("edgemix", f"{found.edgemix} on Python {found.python}"),
        ("System", found.platform),
        ("Processor", processor.name),
        ("Cores", f"{cores}, {processor.usable_cores} usable{quota}; {processor.default_threads} threads by default"),
        ("Instruction sets", " ".join(processor.instruction_sets) or "unknown on this system"),
        ("Memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available"),
    ]


def _providers(found: System) -> list[tuple[str, str, str]]:
    return [
        (state.name, "yes" if state.works else "no", f"{state.trouble}\n{state.remedy}".strip())
        for state in found.providers
    ]


def _packages(found: System) -> list[tuple[str, str]]:
    from edgemix.runtime.machine.system import EXTRA_PACKAGES

    missing = {"onnxruntime", "onnxruntime-gpu"} if found.can_run else set()
    remedies = {name: f" (edgemix[{extra}])" for name, extra in EXTRA_PACKAGES.items()}
    return [
        (name, version or f"not installed{remedies.get(name, '')}")
        for name, version in found.packages.items()
        if version or name not in missing
    ]


def _summary(found: System) -> str:
    if not found.can_run:
        return "This machine cannot run bundles yet: pip install 'edgemix[cpu]', or 'edgemix[gpu]' for CUDA."
    if not found.can_export:
        return "This machine can run bundles. To export them as well: pip install 'edgemix[export]'."
    return "This machine can export and run bundles."
