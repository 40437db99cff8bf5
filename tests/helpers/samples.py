"""A made-up manifest, evaluation and profile with realistic numbers, for tests of reports."""

from __future__ import annotations

import math
import random

import msgspec

from edgemix.bundle.graph_io import GraphConfig
from edgemix.bundle.manifest import (
    BudgetFigures,
    BudgetPoint,
    FileEntry,
    GraphParity,
    Manifest,
    MemberEntry,
    MixtureParity,
    ModelSource,
    QuantizationParity,
    TokenizerEntry,
    Weights,
)
from edgemix.results.evaluation import Evaluation, Figures, Row, WeightTrace
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

MEMBERS = ("math", "code", "wiki")
TEXTS = ("gsm8k-test", "python-heldout", "wikitext2-test")
FIGURES = {
    "quality-size",
    "quality-speed",
    "weight-trace-0",
    "weight-trace-1",
    "tpot",
    "context",
    "ttft",
    "batches",
    "variants",
    "roofline",
    "operators-decode",
    "operators-prefill",
    "layers",
    "weights",
    "quantization",
    "budget",
}
"""Ids of the figures of a complete report."""
_DOMAINS = {
    "math": {"math": 0.98, "code": 0.01, "wiki": 0.01},
    "code": {"math": 0.1, "code": 0.83, "wiki": 0.07},
    "wiki": {"math": 0.0, "code": 0.11, "wiki": 0.89},
}


def manifest(names: tuple[str, ...] = MEMBERS, *, student: bool = True, budget: bool = True) -> Manifest:
    """Return a manifest of members of one size and a student of less than half that size."""
    members = tuple(
        _entry(name, f"members/{name}", 134_515_008, "int8-dynamic", 0.008 + 0.002 * at)
        for at, name in enumerate(names)
    )
    small = _entry("student", "student", 63_713_088, "int4", 0.0197)
    files = {
        f"members/{name}/model.onnx.data": FileEntry(139_000_000 + 50_000 * at, "0" * 64)
        for at, name in enumerate(names)
    }
    if student:
        files |= {"student/model.onnx.data": FileEntry(52_686_848, "0" * 64)}
    files |= {entry.graph: FileEntry(265_000, "0" * 64) for entry in (*members, *([small] if student else []))}
    files["tokenizer/tokenizer.json"] = FileEntry(1_759_767, "0" * 64)
    curve = tuple(BudgetPoint(250_000_000 + 40_000_000 * at, 0.012 + 0.002 * at, 0.09 * 0.5**at) for at in range(6))
    default = (
        dict(zip(names, (0.52, 0.21, 0.27), strict=False)) if len(names) == 3 else dict.fromkeys(names, 1 / len(names))
    )
    domains = (
        {key: dict(zip(names, own.values(), strict=True)) for key, own in _DOMAINS.items()} if len(names) == 3 else {}
    )
    return Manifest(
        schema=2,
        edgemix="0.1.0",
        target="cpu",
        seed=0,
        members=members,
        weights=Weights("fit", default, domains),
        tokenizer=TokenizerEntry("7" * 64, 49_152, (2,)),
        files=files,
        versions={"onnxruntime": "1.32.0", "torch": "2.13.0"},
        checksum="e" * 64,
        student=small if student else None,
        quantization=MixtureParity(default, 1020, 0.0055, 0.008, 1.007) if len(names) > 1 else None,
        budget=BudgetFigures(420_000_000, 0.02, curve[4], dict.fromkeys(names, 0.005), curve) if budget else None,
    )


def _entry(name: str, folder: str, parameters: int, weight_format: str, divergence: float) -> MemberEntry:
    return MemberEntry(
        name=name,
        format=weight_format,
        graph=f"{folder}/model.onnx",
        source=ModelSource(
            "base.gguf", "llama", parameters, "a" * 64, None if name == "student" else name, "apache-2.0"
        ),
        config=GraphConfig(
            exporter="mobius", cache="shared", layers=30, vocabulary=49_152, context=8192, dtype="float32"
        ),
        parity=GraphParity(3.2e-5, 2.3e-5, 3.2e-5, 1e-4),
        quantization=QuantizationParity(1533, divergence, 0.05, 0.019, 0.1, 1.008, 1.05, divergence / 2),
    )


def evaluation(names: tuple[str, ...] = MEMBERS, texts: tuple[str, ...] = TEXTS, *, student: bool = True) -> Evaluation:
    """Return the evaluation of three int8 experts, as once measured, rounded."""
    table = {
        names[0]: (0.637, 0.793, 1.171, 0.893),
        names[1]: (0.945, 0.711, 1.133, 0.932),
        names[2]: (1.120, 0.831, 1.015, 0.978),
        "uniform": (0.741, 0.736, 1.037, 0.850),
        "fitted": (0.708, 0.739, 1.050, 0.847),
        "fitted to math": (0.638, 0.790, 1.168, 0.890),
        "adaptive": (0.648, 0.712, 1.008, 0.812),
        "student": (0.812, 0.901, 1.321, 1.020),
    }
    rows = []
    for name, (*bits, overall) in table.items():
        if name == "student" and not student:
            continue
        kind = "member" if name in names else "student" if name == "student" else "mixture"
        close = {} if kind == "mixture" else {"agreement": 0.8, "acceptance": 0.62 if kind == "student" else 0.81}
        found = [Figures(15_000, 60_000, math.exp(each * 2.5), each, **close) for each in (*bits, overall)]
        rate = {"student": 210.0, "fitted": 30.1}.get(name, 89.0 if kind == "member" else None)
        rows.append(Row(name, {}, dict(zip(texts, found, strict=False)), found[-1], kind, rate))
    return Evaluation(tuple(rows), "fitted")


def weight_traces(names: tuple[str, ...] = MEMBERS, texts: tuple[str, ...] = TEXTS) -> tuple[WeightTrace, ...]:
    """Return a stream in which members take turns to have the largest weight, and a trace of one text."""
    chance = random.Random(0)
    pieces, strengths = [], []
    strength = [0.4, 0.3, 0.3]
    origins = []
    for part in range(6):
        origins.append((len(pieces), texts[part % 3]))
        for _ in range(90):
            strength = [0.94 * each + 0.06 * (at == part % 3) for at, each in enumerate(strength)]
            noisy = [max(0.001, each + chance.gauss(0, 0.03)) for each in strength]
            strengths.append([each / sum(noisy) for each in noisy])
            pieces.append(chance.choice([" the", " number", " of", "\n", " eggs", " def", "(x", ")", " =", " 12"]))
    weights = {name: tuple(each[at] for each in strengths) for at, name in enumerate(names)}
    stream = WeightTrace("stream", tuple(pieces), weights, tuple(origins))
    head = WeightTrace(texts[0], tuple(pieces[:90]), {name: each[:90] for name, each in weights.items()})
    return stream, head


def _measured(median: float, *, stable: bool = True) -> Quantiles:
    return Quantiles(median, median * 1.08, median * 1.31, 0.04 if stable else 0.4, 64, stable)


def profile(names: tuple[str, ...] = MEMBERS, digest: str = "e" * 64) -> Profile:
    """Return the same bundle's profile on a small machine."""
    results = [
        _result(name, "member", "int8-dynamic", 139_000_000, 0.0112 + 0.0002 * at) for at, name in enumerate(names)
    ]
    results += [
        _result("student", "student", "int4", 52_700_000, 0.0047),
        _result("mixture, plain", "mixture", "int8-dynamic", 417_000_000, 0.0342),
        _result(
            "mixture",
            "mixture",
            "int8-dynamic",
            417_000_000,
            0.0149,
            speculation=SpeculationResult(0.61, 1.9, 1.3, 2.3),
        ),
    ]
    return Profile(
        bundle="experts",
        digest=digest,
        created="2026-01-02T03:04:05Z",
        quick=False,
        seconds=312.0,
        machine=Machine(
            processor="A processor of some make",
            cores=2,
            instruction_sets=("avx2", "avx512f", "amx_int8"),
            memory=25_000_000_000,
            platform="Linux x86_64",
            provider="cpu",
            threads=2,
            onnxruntime="1.32.0",
            edgemix="0.1.0",
            bandwidth=21.4e9,
            fp32_peak=96e9,
            int8_peak=1.4e12,
        ),
        loading=Loading(_measured(0.64), 700_000_000, 1_100_000_000, 472_000_000, _measured(1.9)),
        results=tuple(results),
        breakdowns=tuple(_breakdown(name, 1 + 0.03 * at) for at, name in enumerate(names)),
        variants=tuple(
            Variant(
                threads, "cpu", drafts, _measured(0.0149 * (2.1 / threads) ** 0.8 * slower, stable=drafts != "lookup")
            )
            for threads in (1, 2)
            for drafts, slower in (("auto", 1.0), ("lookup", 1.4), ("student", 1.25), ("off", 2.3))
        ),
        notes=("The rate of a batch of 16 was not stable.",),
    )


def bare(whole: Profile) -> Profile:
    """Return the smallest profile: the machine, loading, and one time for each model."""
    loading = msgspec.structs.replace(whole.loading, cold=None)
    machine = msgspec.structs.replace(whole.machine, bandwidth=None, fp32_peak=None, int8_peak=None)
    results = tuple(
        TargetResult(each.name, each.kind, each.format, each.files, decode=each.decode[:1]) for each in whole.results
    )
    return msgspec.structs.replace(whole, machine=machine, loading=loading, results=results, breakdowns=(), variants=())


def _result(
    name: str, kind: str, weight_format: str, files: int, tpot: float, *, speculation: SpeculationResult | None = None
) -> TargetResult:
    weights = files * 0.96
    return TargetResult(
        name=name,
        kind=kind,
        format=weight_format,
        files=files,
        prefill=tuple(Prefill(tokens, _measured(0.01 + tpot * tokens / 30)) for tokens in (16, 64, 256, 1024)),
        decode=tuple(
            Decode(context, _measured(tpot * (1 + context / 6000), stable=name != "student"))
            for context in (16, 256, 1024)
        ),
        batches=tuple(Batch(size, _measured(size**0.62 / tpot)) for size in (1, 4, 16)) if kind == "mixture" else (),
        speculation=speculation,
        roofline=()
        if kind == "mixture"
        else (
            RooflinePoint("decode", int(weights), int(weights), 1, weights / 21.4e9, "memory", tpot),
            RooflinePoint(
                "prefill", int(weights), int(weights * 256), 256, weights * 256 / 1.4e12, "compute", tpot * 8.5
            ),
        ),
        overhead=Overhead(2e-5, 9e-4, 1e-4, 4e-4, 3e-6) if kind == "mixture" else None,
        energy=Energy("package-0", 0.21) if kind == "mixture" else None,
    )


def _breakdown(graph: str, factor: float) -> Breakdown:
    times = {
        "DynamicQuantizeMatMul": (0.061, 0.0084),
        "GroupQueryAttention": (0.014, 0.0007),
        "SkipSimplifiedLayerNormalization": (0.003, 0.0005),
        "Mul": (0.0021, 0.0002),
        "Sigmoid": (0.0017, 0.00015),
        "MatMulNBits": (0.001, 0.0009),
        "Cast": (0.0004, 0.00003),
        "Gather": (0.0002, 0.00002),
        "Reshape": (0.0001, 0.00002),
        "Sub": (0.0001, 0.00001),
    }
    return Breakdown(
        graph=graph,
        prompt=256,
        prefill=0.085 * factor,
        decode=0.0112 * factor,
        operators=tuple(Operator(kind, 30, a * factor, b * factor) for kind, (a, b) in times.items()),
        layers=(
            *(LayerTime(f"layer {at}", 0.0026 * factor, (0.00031 + 0.00002 * (at % 3)) * factor) for at in range(30)),
            LayerTime("embedding", 0.0002, 0.00002),
            LayerTime("head", 0.004, 0.0009),
        ),
    )
