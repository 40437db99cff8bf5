"""Variants of running a mixture, and which one becomes the plan."""

from __future__ import annotations

import time

import pytest
from helpers.profiles import quantiles

from edgemix.bundle.reader import read_manifest
from edgemix.errors import EdgemixError
from edgemix.results.profile import Variant
from edgemix.runtime import Mixture
from edgemix.runtime.profiling.bench import Sizes
from edgemix.runtime.profiling.energy import Meter
from edgemix.runtime.profiling.prompts import Prompts
from edgemix.runtime.profiling.variants import VariantBench, best_of, measure_variants, plan_of, thread_counts


def variant(tpot, speculation="auto", threads=2):
    return Variant(threads, "cpu", speculation, quantiles(tpot))


@pytest.fixture
def bench(student_bundle):
    manifest = read_manifest(student_bundle)
    with Mixture.load(student_bundle, "cpu", 1) as mixture:
        prompts = Prompts(mixture.tokenizer)
    sizes = Sizes((8,), (), (), tokens=4, texts=2, all_targets=False, patience=1.0)
    return VariantBench(student_bundle, manifest, None, all_modes=True, prompts=prompts, sizes=sizes, meter=Meter([]))


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1])])
def test_threads_that_are_tried(cores, counts):
    assert thread_counts(cores) == counts


def test_the_fastest_is_best():
    assert best_of([variant(3.0), variant(1.0, "student", 1), variant(2.0)]) == variant(1.0, "student", 1)


def test_of_nearly_equal_variants_the_simplest_is_best():
    found = [variant(1.0), variant(1.01, "lookup", 2), variant(1.015, "lookup", 1), variant(1.5, "off", 1)]

    assert best_of(found) == variant(1.015, "lookup", 1)


@pytest.mark.parametrize(("speculation", "drafts"), [("off", False), ("lookup", False), ("auto", True)])
def test_a_plan_loads_the_student_only_if_it_drafts(student_bundle, speculation, drafts):
    plan = plan_of(variant(1.0, speculation), read_manifest(student_bundle))

    assert (plan.threads, plan.speculation, plan.drafts, plan.tpot) == (2, speculation, drafts, 1.0)


def test_every_mode_at_every_number_of_threads(bench):
    found, failures = measure_variants(bench, ["cpu"], [2, 1], until=time.perf_counter() + 60)

    assert [(each.threads, each.speculation) for each in found] == [
        (threads, way) for threads in (2, 1) for way in ("off", "lookup", "student", "auto")
    ]
    assert all(each.tpot.p50 > 0 and each.ttft.p50 > 0 for each in found)
    assert failures == []


def test_a_failing_variant_is_reported_and_the_rest_is_measured(bench, monkeypatch):
    original = Mixture.assemble.__func__

    def assemble(cls, bundle, manifest, provider, threads, **options):
        if threads == 2:
            raise EdgemixError("out of memory")
        return original(cls, bundle, manifest, provider, threads, **options)

    monkeypatch.setattr(Mixture, "assemble", classmethod(assemble))

    found, failures = measure_variants(bench, ["cpu"], [2, 1], until=time.perf_counter() + 60)

    assert {each.threads for each in found} == {1}
    assert failures == ["cpu, threads: 2: out of memory"]


def test_no_time_gives_no_variants(bench):
    assert measure_variants(bench, ["cpu"], [1], until=time.perf_counter() - 1) == ([], [])
