"""A profile with every part, for tests of what reads profiles."""

from __future__ import annotations

from typing import Any

from edgemix.results.profile import (
    Batch,
    Breakdown,
    Decode,
    Energy,
    LayerTime,
    Loading,
    Machine,
    Operator,
    Overhead,
    Prefill,
    Profile,
    Quantiles,
    RooflinePoint,
    SpeculationResult,
    TargetResult,
    Variant,
)

MACHINE = Machine(
    processor="A processor",
    cores=2,
    instruction_sets=("avx2", "avx512_vnni"),
    memory=24_000_000_000,
    platform="Linux 6.1 x86_64",
    provider="cpu",
    threads=2,
    onnxruntime="1.32.0",
    edgemix="0.1.0",
    bandwidth=20e9,
    fp32_peak=100e9,
    int8_peak=400e9,
)

BREAKDOWN = Breakdown(
    "math",
    64,
    0.04,
    0.009,
    (Operator("MatMul", 150, 0.03, 0.007), Operator("Mul", 218, 0.008, 0.001)),
    (
        LayerTime("embedding", 0.001, 0.0001),
        LayerTime("layer 0", 0.03, 0.006),
        LayerTime("head", 0.007, 0.002),
    ),
)


def quantiles(p50: float, spread: float = 0.02, *, stable: bool = True) -> Quantiles:
    return Quantiles(p50, p50 * 1.1, p50 * 1.3, spread, 30, stable)


def sample_profile(slower: float = 1.0, **changes: Any) -> Profile:
    """Two members, a student and their mixture; every time is `slower` times as long."""

    def result(name: str, kind: Any, tpot: float, **more: Any) -> TargetResult:
        return TargetResult(
            name,
            kind,
            "int4" if kind == "student" else "int8",
            140_000_000,
            prefill=(Prefill(64, quantiles(4 * tpot * slower)), Prefill(512, quantiles(30 * tpot * slower))),
            decode=(Decode(64, quantiles(tpot * slower)), Decode(512, quantiles(1.3 * tpot * slower))),
            **more,
        )

    roof = RooflinePoint("decode", 140_000_000, 134_000_000, 1, 0.007, "memory", 0.01 * slower)
    return Profile(
        bundle="mixture",
        digest="0" * 64,
        created="2026-11-25T12:00:00Z",
        quick=False,
        seconds=120.0,
        machine=MACHINE,
        loading=Loading(quantiles(0.6 * slower), 400_000_000, 600_000_000, 420_000_000, quantiles(1.5 * slower)),
        results=(
            result("math", "member", 0.01, roofline=(roof,), loading=Loading(quantiles(0.3), 1, 2, 3)),
            result("code", "member", 0.01, roofline=(roof,)),
            result("student", "student", 0.004),
            result(
                "mixture, plain",
                "mixture",
                0.021,
                batches=(Batch(4, quantiles(120 / slower)), Batch(16, quantiles(200 / slower))),
                overhead=Overhead(1e-5, 8e-4, 1e-5, 2e-4, 2e-6),
                energy=Energy("package-0", 0.4),
            ),
            result("mixture", "mixture", 0.012, speculation=SpeculationResult(0.6, 1.2, 1.1, 1.75)),
        ),
        breakdowns=(BREAKDOWN,),
        variants=(
            Variant(1, "cpu", "off", quantiles(0.04)),
            Variant(2, "cpu", "auto", quantiles(0.012), quantiles(0.08), chosen=True),
        ),
        notes=("the file cache could not be dropped",),
        **changes,
    )
