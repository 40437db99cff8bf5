"""Fewer calls, and the same text: the plain loop's token for token; where tokens are drawn, its distribution."""

import dataclasses
import itertools
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from helpers.cut_students import write_cut_graph
from helpers.onnx_members import ClosedForm, random_member, write_graph

from edgemix.export.drafting.ngrams import count_ngrams
from edgemix.runtime.decoding.cost_model import SpeculationCostModel
from edgemix.runtime.decoding.drafters import NgramDrafter, StudentDrafter
from edgemix.runtime.decoding.sampling import Sampling, distribution
from edgemix.runtime.decoding.speculative import SpeculativeDecoding
from edgemix.runtime.decoding.static_batch import StaticBatch
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.mixing.adaptive import AdaptivePrior
from edgemix.runtime.mixing.arithmetic import log_softmax
from edgemix.runtime.mixing.ensemble import Ensemble
from edgemix.runtime.sequences.state import SequenceState

TOKENS = 16
PROMPT = [3, 7, 1, 1, 9]
WEIGHTS = {"even": [0.4, 0.35, 0.25], "uneven": [0.02, 0.95, 0.03]}
SOME = [0, 2, 3, 7, 8, 9, 14]
FORMS = [random_member(1, pull=6.0), random_member(2, cache="growing", padding=3), random_member(3)]


@pytest.fixture
def members(load):
    return [load(form) for form in FORMS]


def pupil():
    tables = [random_member(seed).table for seed in (1, 2)]
    return ClosedForm(tables[0] / 2 + tables[1])


@pytest.fixture
def student(load):
    return Ensemble((load(pupil()),), np.ones(1), "linear", TOKENS)


@pytest.fixture
def cut(tmp_path):
    """The same student, which drafts the tokens `SOME` only."""
    whole, graph = tmp_path / "whole.onnx", tmp_path / "cut.onnx"
    config = msgspec.structs.replace(write_graph(whole, pupil()), vocabulary=len(SOME))
    write_cut_graph(whole, graph, SOME)
    member = DecoderGraph.load(graph, config, threads=1, tokens=np.array(SOME))
    return Ensemble((member,), np.ones(1), "linear", TOKENS)


@pytest.fixture
def drafters(student, ngrams):
    """All that may draft beside the text itself."""
    return {"student": student, "ngrams": ngrams}


@pytest.fixture
def ngrams(members):
    """Counted in what the first two members would write."""
    generator = np.random.default_rng(0)
    texts = []
    for member in members[:2]:
        alone = Ensemble((member,), np.ones(1), "linear", TOKENS)
        for _ in range(8):
            prompt = generator.integers(0, TOKENS, 3).tolist()
            options = {"seeds": [0], "max_new_tokens": 40, "context": 100, "eos": ()}
            decoding = StaticBatch(alone, [prompt], Sampling(temperature=0.5), **options)
            texts.append([token.id for _ in range(40) for token in decoding.step()])
    return count_ngrams(texts, 100)


def ensemble(members, weights, combine="linear", *, adaptive=False):
    experts = AdaptivePrior.of("abc"[: len(members)], dict(zip("abc", weights, strict=False)), {}) if adaptive else None
    return Ensemble.of(members, np.array(weights), combine, TOKENS, experts)


def watched(graph, reads):
    """The graph, which adds the number of tokens of each of its calls to `reads`."""

    @contextmanager
    def watch(_, tokens):
        reads.append(tokens)
        yield

    return graph.watched(watch)


def counted(mixture, reads):
    """An ensemble whose graphs are `watched`."""
    return dataclasses.replace(mixture, graphs=tuple(watched(graph, reads) for graph in mixture.graphs))


def plain(mixture, sampling=Sampling(), *, most=60, context=100, eos=()):  # noqa: B008
    decoding = StaticBatch(mixture, [PROMPT], sampling, seeds=[0], max_new_tokens=most, context=context, eos=eos)
    tokens = [token for _ in range(most) for token in decoding.step()]
    return [(token.id, token.finish_reason) for token in tokens], decoding.log_probabilities(0)


def fast(mixture, sampling=Sampling(), *, seed=0, most=60, context=100, eos=(), prompt=PROMPT, **options):  # noqa: B008
    decoding = SpeculativeDecoding(
        mixture, prompt, sampling, seed=seed, max_new_tokens=most, context=context, eos=eos, **options
    )
    tokens = []
    while new := decoding.step():
        tokens += [(token.id, token.finish_reason) for token in new]
    return tokens, decoding.log_probabilities(0), decoding


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("drafts", ["none", "lookup", "ngrams", "student", "all"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_greedy_text_is_the_plain_loops(members, drafters, weights, drafts, lazy):
    mixture = ensemble(members, WEIGHTS[weights])
    options = {name: drafter for name, drafter in drafters.items() if drafts in (name, "all")}
    options["lookup"] = drafts in ("lookup", "all")
    expected, log_probabilities = plain(mixture)
    tokens, found, decoding = fast(mixture, lazy=lazy, **options)
    assert tokens == expected
    np.testing.assert_allclose(found, log_probabilities, atol=1e-4)
    if drafts != "none":
        assert 0 < decoding.accepted < decoding.drafted, "drafts must be taken and refused for this to tell much"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_student_of_some_tokens_drafts_the_plain_loops_text(members, cut, weights, lookup):
    mixture = ensemble(members, WEIGHTS[weights])
    expected, log_probabilities = plain(mixture)
    tokens, found, decoding = fast(mixture, student=cut, lookup=lookup)
    assert tokens == expected
    np.testing.assert_allclose(found, log_probabilities, atol=1e-4)
    assert 0 < decoding.accepted < decoding.drafted


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=3)])
def test_what_a_student_of_some_tokens_drafts(cut, sampling):
    """Ids of all tokens, drawn by the whole student's distribution over its own."""
    sequence = SequenceState(cut.active_graphs()[0], TOKENS)
    drafts = StudentDrafter(sequence, sampling, np.random.default_rng(0), SpeculationCostModel(), eos=frozenset([3]))
    text = np.array(PROMPT)
    tokens, sources, proposals = drafts.draft(text, 6)
    assert len(tokens) == len(sources) == 6 or tokens[-1] == 3
    for place, token in enumerate(tokens):
        logits = pupil().logits([*PROMPT, *tokens[:place]])[-1].astype(np.float32)
        kept = np.isin(np.arange(TOKENS), SOME)
        logits[~kept] = -np.inf
        if not sampling.temperature:
            assert token == logits.argmax()
        else:
            assert proposals[place][token] > 0
            np.testing.assert_allclose(proposals[place], distribution(log_softmax(logits), sampling), atol=1e-5)
            assert np.count_nonzero(proposals[place]) == 3


@pytest.mark.usefixtures("eager")
def test_nothing_is_drafted_where_none_of_the_students_tokens_may_come(cut):
    """It is not even asked."""
    calls, allowed = [], np.zeros((2, TOKENS), bool)
    allowed[0, [1, 7, 11]] = allowed[1, [1, 11]] = True
    sequence = SequenceState(counted(cut, calls).active_graphs()[0], TOKENS)
    for temperature in (0.0, 1.0):
        sampling, generator = Sampling(temperature=temperature), np.random.default_rng(0)
        drafts = StudentDrafter(
            sequence, sampling, generator, SpeculationCostModel(), allow=lambda ahead: allowed[min(len(ahead), 1)]
        )
        found = drafts.draft(np.array(PROMPT), 6)
        assert found.tokens == [7]
        assert found.proposals is None or found.proposals[0][7] == 1
        sequence.truncate(0)
    assert len(calls) == 2
    drafts = StudentDrafter(sequence, Sampling(), generator, SpeculationCostModel(), allow=lambda _: allowed[1])
    assert drafts.draft(np.array(PROMPT), 6).tokens == []
    assert len(calls) == 2


@pytest.mark.parametrize("weights", WEIGHTS)
def test_adaptive_text_is_the_plain_loops(members, student, eager, weights):
    mixture = ensemble(members, WEIGHTS[weights], adaptive=True)
    expected, log_probabilities = plain(mixture)
    tokens, found, _ = fast(mixture, student=student)
    assert tokens == expected
    np.testing.assert_allclose(found, log_probabilities, atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3)])
@pytest.mark.parametrize("combine", ["linear", "log-linear"])
def test_penalties_and_products_are_the_plain_loops(members, student, eager, sampling, combine):
    mixture = ensemble(members, WEIGHTS["even"], combine)
    expected, log_probabilities = plain(mixture, sampling)
    tokens, found, _ = fast(mixture, sampling, student=student)
    assert tokens == expected
    np.testing.assert_allclose(found, log_probabilities, atol=1e-4)


def test_it_stops_where_the_plain_loop_stops(members, student, eager):
    mixture = ensemble(members, WEIGHTS["even"])
    text = [token for token, _ in plain(mixture)[0]]
    for eos in set(text):
        assert fast(mixture, eos=[eos], student=student)[0] == plain(mixture, eos=[eos])[0]
    for context in range(6, 12):
        assert fast(mixture, context=context, student=student)[0] == plain(mixture, context=context)[0]
    for most in range(1, 8):
        assert fast(mixture, most=most, student=student)[0] == plain(mixture, most=most)[0]


def test_members_are_asked_only_where_it_matters(members):
    active, even = ensemble(members, WEIGHTS["uneven"]), ensemble(members, WEIGHTS["even"])
    calls = {name: fast(mixture, lookup=False)[2].calls for name, mixture in (("active", active), ("even", even))}
    assert calls["active"] < 1.3 * 60
    assert calls["active"] < calls["even"] <= 3 * 60
    assert fast(active, lookup=False, lazy=False)[2].calls == 3 * 60


def test_repetition_is_read_in_few_calls(load, eager):
    """A member that says the same four tokens again and again needs no call for each."""
    table = np.zeros((TOKENS, TOKENS), np.float32)
    for before, after in itertools.pairwise([2, 5, 8, 11, 2]):
        table[before, after] = 20
    tokens, _, decoding = fast(ensemble([load(ClosedForm(table))], [1.0]), prompt=[2], most=100, context=200)
    assert [token for token, _ in tokens] == [5, 8, 11, 2] * 25
    assert decoding.calls < 20


def joint(weights, sampling, prompt):
    """Probabilities [TOKENS, TOKENS] of the next two tokens, from closed forms."""

    def following(text):
        parts = sum(w * np.exp(f.log_probabilities(text)[-1]) for w, f in zip(weights, FORMS, strict=True))
        return distribution(np.log(parts).astype(np.float32), sampling).astype(np.float64)

    first = following(prompt)
    return first[:, None] * np.stack([following([*prompt, token]) for token in range(TOKENS)])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("drafts", ["none", "lookup", "student", "cut", "ngrams", "all"])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=0.8, top_k=9), Sampling(temperature=1.3, top_p=0.9)]
)
def test_drawn_text_has_the_mixtures_distribution(members, drafters, cut, sampling, drafts):
    """By a chi-square test on the next two tokens: the second is where the first draft is tried."""
    weights, prompt, count = WEIGHTS["even"], [4, 6, 4, 6, 4], 900
    mixture = ensemble(members, weights)
    counts = np.zeros((TOKENS, TOKENS))
    options = {"student": {"student": drafters["student"], "cut": cut, "all": cut}.get(drafts)}
    options["lookup"] = drafts in ("lookup", "all")
    options["ngrams"] = drafters["ngrams"] if drafts in ("ngrams", "all") else None
    for seed in range(count):
        tokens, _, _ = fast(mixture, sampling, prompt=prompt, seed=seed, most=3, **options)
        counts[tokens[0][0], tokens[1][0]] += 1
    expected = count * joint(weights, sampling, prompt)
    assert not counts[expected == 0].any()
    order = np.argsort(expected.ravel())
    cells = np.cumsum(expected.ravel()[order]) // 8  # cells of at least about 8 expected
    groups = np.unique(cells, return_inverse=True)[1]
    seen, wanted = (np.bincount(groups, each.ravel()[order]) for each in (counts, expected))
    keep = wanted > 0
    statistic, freedom = (((seen - wanted) ** 2)[keep] / wanted[keep]).sum(), keep.sum() - 1
    assert statistic < freedom + 3.5 * np.sqrt(2 * freedom), (statistic, freedom)


def test_the_student_drafts_where_it_is_likely_to_save_more(members, student, monkeypatch):
    """Than what followed the last token alone when it came before."""
    monkeypatch.setattr(SpeculationCostModel, "worth_drafting", lambda *_: True)
    drafted, options = {}, {"seed": 0, "max_new_tokens": 9, "context": 100, "eos": (), "student": student}
    for right in (False, True):
        decoding = SpeculativeDecoding(ensemble(members, WEIGHTS["even"]), [*PROMPT, 7], Sampling(), **options)
        for _ in range(20):
            decoding._cost_model.record_request("student", calls=1, drafted=1)
            decoding._cost_model.record_decision(("student", 1), accepted=right)
        drafted[right] = {source for source, _ in decoding._find_draft().sources}
    assert drafted == {False: {"lookup"}, True: {"student"}}


@pytest.mark.usefixtures("eager")
def test_the_student_reads_the_end_of_a_long_prompt(members, student, monkeypatch):
    mixture, reads = ensemble(members, WEIGHTS["uneven"]), []
    student = counted(student, reads)
    prompt = np.random.default_rng(0).integers(0, TOKENS, 60).tolist()
    monkeypatch.setattr("edgemix.runtime.decoding.drafters.STUDENT_PROMPT_TOKENS", 20)
    options = {"prompt": prompt, "lookup": False, "context": 200}
    tokens, _, decoding = fast(mixture, student=student, **options)
    assert tokens == fast(mixture, **options)[0]
    assert decoding.drafted
    assert max(reads) <= 21


def test_a_member_that_writes_on_alone_saves_the_others_calls(members, monkeypatch):
    """It is asked for a token at a time; the others for several."""
    counts = []
    for waits in (True, False):
        monkeypatch.setattr(SpeculationCostModel, "defer_verification", lambda *_, waits=waits: waits)
        reads = []
        mixture = ensemble([members[0], *(watched(member, reads) for member in members[1:])], [0.5, 0.3, 0.2])
        tokens, *_ = fast(mixture, lookup=False)
        counts.append((len(reads), tokens))
    (alone, text), (together, other) = counts
    assert text == other
    assert alone < 0.8 * together


@pytest.mark.usefixtures("eager")
def test_a_member_that_writes_on_alone_is_drafted_for(members, load, monkeypatch):
    """By a student that knows most of what it will say."""
    monkeypatch.setattr(SpeculationCostModel, "expected_saving", lambda *_: 1.0)
    reads = []
    mixture = ensemble([watched(members[0], reads), *members[1:]], [0.5, 0.3, 0.2])
    table = FORMS[0].table.copy()
    table[::3, 0] += 20
    nearly = Ensemble((load(dataclasses.replace(FORMS[0], table=table)),), np.ones(1), "linear", TOKENS)
    counts = []
    for student in (None, nearly):
        tokens, *_ = fast(mixture, lookup=False, student=student)
        counts.append((len(reads), tokens))
        reads.clear()
    (unaided, text), (aided, other) = counts
    assert text == other == plain(mixture)[0]
    assert aided < 0.6 * unaided


def test_reading_a_prompt_is_not_drafting(student, monkeypatch):
    """The 20 tokens of it come once, one by one afterwards."""
    clock = itertools.count()
    monkeypatch.setattr("edgemix.runtime.decoding.drafters.time.perf_counter", lambda: float(next(clock)))
    cost_model = SpeculationCostModel()
    drafts = StudentDrafter(
        SequenceState(student.active_graphs()[0], TOKENS), Sampling(), np.random.default_rng(0), cost_model
    )
    prompt = np.tile(np.array(PROMPT), 4)
    drafts.draft(prompt, 1)
    assert cost_model.drafting_seconds("student") == 0
    for count in range(1, 40):
        drafts.draft(np.append(prompt, np.full(count, 3)), 1)
    assert cost_model.drafting_seconds("student") == pytest.approx(1, rel=0.02)


def test_a_member_is_told_whether_it_was_right_to_ask(members, monkeypatch):
    """Else what is believed of its word would never change while it asks each time."""
    monkeypatch.setattr(SpeculationCostModel, "defer_verification", lambda *_: False)
    mixture, decisions, record = ensemble(members, [0.5, 0.3, 0.2]), [], SpeculationCostModel.record_decision
    monkeypatch.setattr(
        SpeculationCostModel, "record_decision", lambda self, *a, **o: decisions.append(a) or record(self, *a, **o)
    )
    decoded, *_ = fast(mixture, lookup=False)
    assert decoded == plain(mixture)[0]
    assert {name for (name, _), _ in decisions} == {"alone"}
    assert {right for _, right in decisions} == {False, True}


@pytest.mark.usefixtures("eager")
def test_what_the_student_has_not_read_is_part_of_its_price(student):
    cost_model = SpeculationCostModel()
    for tokens in (1, 5, 2, 9) * 6:
        cost_model.record_call("student", tokens, 0.001 * tokens, verifies=False)
    cost_model.record_call(0, 1, 0.01)
    cost_model.record_step(0.01, 1)
    drafts = StudentDrafter(
        SequenceState(student.active_graphs()[0], TOKENS), Sampling(), np.random.default_rng(0), cost_model
    )
    text = np.tile(np.array(PROMPT), 2)
    drafts.draft(text, 1)
    assert cost_model.extra_token_seconds("student") > 0
    up_to_date, behind = (
        drafts.expected_saving(np.append(text, 3), 4),
        drafts.expected_saving(np.append(text, [3] * 6), 4),
    )
    assert up_to_date - behind == pytest.approx(5 * cost_model.extra_token_seconds("student"))


def coins(monkeypatch, seed):
    """Whether a draft pays, and whether to wait for the others, is chance."""
    generator = np.random.default_rng(seed)
    for question in ("worth_drafting", "defer_verification"):
        monkeypatch.setattr(SpeculationCostModel, question, lambda *_: bool(generator.random() < 0.6))
    monkeypatch.setattr(SpeculationCostModel, "expected_saving", lambda *_: generator.random() - 0.4)


def test_a_student_that_saves_nothing_is_left_alone(members, student, monkeypatch):
    monkeypatch.setattr(SpeculationCostModel, "worth_drafting", lambda *_: True)
    for promise in (-1.0, 1.0):
        monkeypatch.setattr(SpeculationCostModel, "expected_saving", lambda *_, promise=promise: promise)
        *_, decoding = fast(ensemble(members, WEIGHTS["even"]), student=student, lookup=False, lazy=False)
        assert (decoding.drafted > 0) == (promise > 0)


def test_nothing_is_drafted_behind_an_end_of_text(ngrams):
    cost_model = SpeculationCostModel()
    texts = [np.array(text) for text in itertools.product(range(TOKENS), repeat=2)]
    drafted = [NgramDrafter(ngrams, cost_model).draft(text, 9).tokens for text in texts]
    (end, *_) = (tokens[0] for tokens in drafted if len(tokens) > 1)
    for text, tokens in zip(texts, drafted, strict=True):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert NgramDrafter(ngrams, cost_model, eos=frozenset([end])).draft(text, 9).tokens == expected


def test_ngrams_draft_where_the_text_has_nothing_yet(members, ngrams):
    mixture, options = ensemble(members, WEIGHTS["even"]), {"seed": 0, "max_new_tokens": 9, "context": 100, "eos": ()}
    drafted = set()
    for one in range(TOKENS):
        for prompt, source in (([one, (one + 1) % TOKENS], "n-gram"), ([one, 3, 8, 3, 8, 3, 8, one], "lookup")):
            decoding = SpeculativeDecoding(mixture, prompt, Sampling(), ngrams=ngrams, **options)
            sources = {name for name, _ in decoding._find_draft().sources}
            assert sources <= {source}
            drafted |= sources
    assert drafted == {"n-gram", "lookup"}


def test_chances_of_ngrams_decide_how_far_they_draft(ngrams):
    cost_model = SpeculationCostModel()
    drafts = NgramDrafter(ngrams, cost_model)
    text = next(
        text for text in itertools.product(range(TOKENS), repeat=2) if len(drafts.draft(np.array(text), 9).tokens) > 2
    )
    tokens, sources, proposals = drafts.draft(np.array(text), 9)
    assert proposals is None
    assert {name for name, _ in sources} == {"n-gram"}
    assert drafts.draft(np.array(text), 2).tokens == tokens[:2]
    for _ in range(30):
        cost_model.record_decision(sources[0], accepted=False)
    assert drafts.draft(np.array(text), 9).tokens == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("adaptive", [False, True])
def test_greedy_text_is_the_plain_loops_whatever_pays(members, drafters, monkeypatch, adaptive, seed):
    coins(monkeypatch, seed)
    mixture = ensemble(members, WEIGHTS["even"], adaptive=adaptive)
    eos = [int(plain(mixture)[0][-1][0])] if seed % 2 else ()
    expected, log_probabilities = plain(mixture, eos=eos)
    tokens, found, _ = fast(mixture, **drafters, eos=eos)
    assert tokens == expected
    np.testing.assert_allclose(found, log_probabilities, atol=1e-4)
