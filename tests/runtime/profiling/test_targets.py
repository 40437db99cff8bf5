"""Targets, their runs and results, and that observing a text does not change it."""

from __future__ import annotations

import json

import pytest
from helpers.onnx_members import random_member, saying, write_bundle

from edgemix.bundle.reader import read_manifest
from edgemix.errors import InputError
from edgemix.runtime import Mixture
from edgemix.runtime.profiling import targets as module
from edgemix.runtime.profiling.bench import Bench, Sizes, speculation
from edgemix.runtime.profiling.energy import Meter
from edgemix.runtime.profiling.prompts import PASSAGES, Prompts
from edgemix.runtime.profiling.targets import FAST, PLAIN, list_modes, list_targets
from edgemix.runtime.profiling.timeline import MIXING, STEPS, TOKENIZER, Timeline, Trace, overhead, watch

SIZES = Sizes((8, 24), (5,), (2,), tokens=6, texts=2, all_targets=True, patience=9.0)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = write_bundle(
        tmp_path_factory.mktemp("targets") / "bundle",
        {"math": random_member(1, tokens=258), "code": random_member(2, tokens=258)},
        weights={"math": 0.7, "code": 0.3},
        student=random_member(1, tokens=258),
    )
    with Mixture.load(folder, "cpu", 1, plan=False) as mixture:
        yield mixture


def test_members_student_and_both_mixtures(mixture):
    found = {target.name: target for target in list_targets(mixture)}

    assert list(found) == ["math", "code", "student", PLAIN, FAST]
    assert [target.kind for target in found.values()] == ["member", "member", "student", "mixture", "mixture"]
    assert [target.plain for target in found.values()] == [True, True, True, True, False]
    assert found[PLAIN].files == found["math"].files + found["code"].files
    assert [entry.name for entry in found[PLAIN].entries] == ["math", "code"]


def test_the_student_alone_is_its_whole_graph(student_bundle):
    manifest = read_manifest(student_bundle)
    with (
        Mixture.load(student_bundle, "cpu", 1, plan=False) as mixture,
        Mixture.load(student_bundle, "cpu", 1, student=True) as student,
    ):
        found = {target.name: target for target in list_targets(mixture, student=student)}
        run = found["student"].run([[1, 2, 3]], 5, meter=Meter([]), patience=9)
    assert [member.vocabulary for member in found["student"].ensemble.graphs] == [258]
    assert [member.vocabulary for member in found[FAST].student.graphs] == [manifest.student.draft.vocabulary]
    assert found["student"].files == manifest.files["student/model.onnx"].size
    assert run.tokens == 5


def test_a_member_that_weighs_nothing_is_measured_but_not_mixed(mixture):
    found = {target.name: target for target in list_targets(mixture, {"code": 1.0})}

    assert [entry.name for entry in found[FAST].entries] == ["code"]
    assert "math" in found


def test_speculation_modes_depend_on_the_bundle(mixture, bundle):
    assert [target.speculation for target in list_modes(mixture)] == ["off", "lookup", "student", "auto"]
    with Mixture.load(bundle, "cpu", 1) as without_student:
        assert [target.speculation for target in list_modes(without_student)] == ["off", "lookup"]


def test_a_single_member_is_not_mixed_plainly(tmp_path):
    with Mixture.load(write_bundle(tmp_path / "b", {"math": saying("1+2=3")}), "cpu", 1) as mixture:
        found = list_targets(mixture)
        bench = Bench(found, Prompts(mixture.tokenizer), SIZES, Meter([]))
        bench.measurements[0].turn()

        assert [target.name for target in found] == ["math", FAST]
        assert bench.result(FAST).speculation is not None


@pytest.mark.parametrize("stacked", [True, False])
def test_a_graph_of_several_members_is_one(tmp_path, stacked):
    forms = {"math": random_member(1, tokens=258), "code": random_member(2, tokens=258)}
    with Mixture.load(write_bundle(tmp_path / "b", forms, stacked=stacked), "cpu", 1) as mixture:
        found = {target.name: target for target in list_targets(mixture)}

    assert len(found[PLAIN].entries) == len(found[PLAIN].ensemble.graphs) == (1 if stacked else 2)


def test_a_run_counts_and_does_not_end_with_the_text(mixture):
    found = {target.name: target for target in list_targets(mixture)}
    prompt = Prompts(mixture.tokenizer).take(9)

    plain = found[PLAIN].run([prompt], 12, meter=Meter([]), patience=99)
    fast = found[FAST].run([prompt], 12, meter=Meter([]), patience=99)
    batch = found[PLAIN].run([prompt, prompt], 12, meter=Meter([]), patience=99)

    assert (plain.tokens, len(plain.tpot), plain.drafted) == (12, 12, 0)
    assert (batch.tokens, len(batch.tpot)) == (24, 12)
    assert fast.calls > 0
    assert 0 <= fast.accepted <= fast.drafted
    assert 0 < fast.tokens <= 12


def test_a_slow_run_ends_early(mixture, monkeypatch):
    monkeypatch.setattr(module, "MIN_TOKENS", 3)

    run = list_targets(mixture)[0].run([[1, 2, 3]], 50, meter=Meter([]), patience=0)

    assert run.tokens == 3


def test_every_prompt_has_the_requested_length(mixture):
    prompts = Prompts(mixture.tokenizer)

    assert prompts.count == len(PASSAGES)
    assert len({tuple(prompts.take(20, number)) for number in range(prompts.count)}) == prompts.count
    assert [len(prompts.take(size, 3)) for size in (1, 7, 5000)] == [1, 7, 5000]
    assert bytes(prompts.take(10)).decode() == PASSAGES[0][:10]


def test_prompts_of_a_given_text(mixture):
    assert bytes(Prompts(mixture.tokenizer, "abc").take(5)) == b"abcab"
    with pytest.raises(InputError, match="no text"):
        Prompts(mixture.tokenizer, "")


def test_a_bench_measures_every_size(mixture):
    bench = Bench(list_targets(mixture), Prompts(mixture.tokenizer), SIZES, Meter([]))
    for measurement in bench.measurements:
        measurement.turn()

    math, plain, fast = (bench.result(name) for name in ("math", PLAIN, FAST))

    assert [prefill.tokens for prefill in math.prefill] == [5, 8, 24]
    assert [decode.context for decode in plain.decode] == [8, 24]
    assert [batch.size for batch in math.batches] == [2]
    assert fast.batches == ()
    assert fast.speculation.speedup > 0
    assert plain.speculation is None
    assert math.energy is None
    assert bench.missing() == []


def test_measurements_without_time_are_missing(mixture):
    bench = Bench(list_targets(mixture), Prompts(mixture.tokenizer), SIZES, Meter([]))

    assert len(bench.missing()) == len(bench.measurements)
    assert bench.result("math").decode == ()


def test_sizes_are_cut_to_the_context():
    assert SIZES.within(20).contexts == (8, 14)
    assert SIZES.within(9).contexts == (3,)
    assert SIZES.within(1).contexts == (1,)
    assert SIZES.within(4).prompts == (4,)


def test_energy_per_token(mixture):
    class Counter:
        name = "package-0"
        total = 0.0

        def read(self):
            self.total += 12.0
            return self.total

        def spent(self, before, after):
            return after - before

    bench = Bench(list_targets(mixture), Prompts(mixture.tokenizer), SIZES, Meter([Counter()]))
    bench.measurements[1].turn()

    energy = bench.result("math").energy
    assert (energy.counter, energy.joules) == ("package-0", pytest.approx(12 / 6))


def test_speculation_by_hand():
    def run(seconds, tokens, calls=0, drafted=0, accepted=0):
        return module.Run(0.1, [], tokens, seconds, calls, drafted, accepted, {})

    found = speculation([(run(10, 10), run(4, 8, 6, 10, 5)), (run(10, 10), run(2, 8, 2, 6, 3))])

    assert found.acceptance == pytest.approx(0.5)
    assert found.drafted == pytest.approx(1.0)
    assert found.calls == pytest.approx(0.5)
    assert found.speedup == pytest.approx((2 + 4) / 2)
    assert speculation([(run(1, 1), run(1, 1))]).acceptance is None


def test_observing_a_text_does_not_change_it(mixture):
    prompt = Prompts(mixture.tokenizer).take(12)
    for target in list_targets(mixture):
        written = []
        decoding = target.start([prompt], 9)
        while step := decoding.step():
            written += [token.id for token in step]

        timeline, tokens = watch(target, prompt, 8, mixture.tokenizer, patience=99)

        assert len(written) == 9
        assert tokens == 8
        assert {STEPS, TOKENIZER} <= set(timeline.own())


def test_overhead_is_the_time_outside_onnx_runtime(mixture):
    target = {each.name: each for each in list_targets(mixture)}[PLAIN]
    timeline, tokens = watch(target, [1, 2, 3], 8, mixture.tokenizer, patience=99)

    found = overhead(timeline, tokens, 1e-6)
    first, *steps = sorted((span for span in timeline.spans if span.track == STEPS), key=lambda span: span.begin)
    graphs = [s for s in timeline.spans if s.track in ("math", "code") and s.begin >= first.end]
    whole = sum(span.end - span.begin for span in steps) - sum(span.end - span.begin for span in graphs)

    assert first.name == "prompt"
    assert len(graphs) == 2 * 8
    assert 8 * (found.mixing + found.sampling + found.other) == pytest.approx(whole, rel=1e-6)
    assert min(found.mixing, found.sampling, found.tokenizer, found.other) > 0
    assert found.encode == 1e-6


def test_no_tokens_have_no_overhead():
    assert overhead(Timeline(), 0, 0.0) is None


def test_spans_exclude_nested_spans(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("edgemix.runtime.profiling.timeline.time.perf_counter", lambda: next(times))
    timeline = Timeline()

    with timeline.span("outer"), timeline.span("inner", tokens=4):
        pass

    assert timeline.own() == {"outer": 8.0, "inner": 2.0}


def test_the_trace_has_members_as_tracks(mixture):
    target = {each.name: each for each in list_targets(mixture)}[FAST]
    timeline, _ = watch(target, [1, 2, 3], 8, mixture.tokenizer, patience=99)
    trace = Trace()
    trace.add(FAST, timeline.spans)
    trace.add("nothing", [])

    events = json.loads(trace.encode())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]

    assert {"math", "student", STEPS, MIXING} <= names
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == [FAST]
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] >= 0 for event in spans)
    assert any(event["args"] == {"tokens": 3} for event in spans if "args" in event)
