"""The teacher from a bundle and from torch, and its distributions on disk."""

from __future__ import annotations

import copy
import signal

import msgspec
import numpy as np
import pytest
import torch
from helpers.onnx_members import random_member, write_bundle
from helpers.tiny_models import tiny_model

from edgemix.bundle.manifest import ModelSource
from edgemix.errors import EdgemixError
from edgemix.export.distillation.teacher import RuntimeTeacher, TorchTeacher, teacher_in_export
from edgemix.export.distillation.teacher_cache import TeacherCache
from edgemix.export.models.loading import LoadedMember
from edgemix.export.training.losses import top_k
from edgemix.runtime import Mixture

VOCABULARY = 150
WEIGHTS = {"a": 0.6, "b": 0.4, "c": 0.0}


def windows(count=40, length=12, vocabulary=VOCABULARY):
    return np.random.default_rng(0).integers(3, vocabulary, (count, length))


@pytest.fixture(scope="module")
def members():
    models = {"a": tiny_model("llama"), "b": tiny_model("gpt2"), "c": tiny_model("gemma2")}
    return [
        LoadedMember(name, model, None, ModelSource(name, name, 0, name * 64)) for name, model in models.items()
    ]  # fmt: skip


@pytest.fixture
def torch_teacher(members):
    return teacher_of(members)


def teacher_of(members, weights=WEIGHTS, **options):
    teacher = TorchTeacher(members, VOCABULARY, torch.device("cpu"), **options)
    teacher.set_weights(weights)
    return teacher


def mixture_of(members, ids, weights):
    with torch.no_grad():
        logits = {m.name: m.model(input_ids=torch.from_numpy(ids)).logits[:, :-1, :VOCABULARY] for m in members}
    return sum(weights[name] * each.softmax(-1).flatten(0, 1) for name, each in logits.items())


def same_top(one, other, **tolerance):
    orders = [top.ids.argsort(-1) for top in (one, other)]
    assert torch.equal(one.ids.gather(1, orders[0]), other.ids.gather(1, orders[1]))
    for a, b in ((one.log_probabilities.gather(1, orders[0]), other.log_probabilities.gather(1, orders[1])),
                 (one.tail, other.tail)):  # fmt: skip
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_torch_members_are_mixed_linearly(members, temperature, monkeypatch):
    monkeypatch.setattr("edgemix.export.distillation.teacher.has_fast_bfloat16", lambda device: False)
    teacher = teacher_of(members, {"a": 3.0, "b": 2.0})
    ids = windows(5)
    expected = top_k(mixture_of(members, ids, WEIGHTS).log(), 7, temperature)
    same_top(teacher.top_k(ids, 7, temperature), expected, rtol=1e-4, atol=1e-4)
    assert teacher.context == 256


def test_half_precision_and_4_bits_are_near(members):
    ids = windows(5)
    whole = mixture_of(members, ids, WEIGHTS)
    plain, small = teacher_of(members), teacher_of(members, four_bit=True)
    kinds = [
        {type(module).__name__ for placed in teacher._active for module in placed.model.modules()}
        for teacher in (plain, small)
    ]
    assert ["Linear4bit" in each for each in kinds] == [False, True]
    off = {}
    for name, teacher in (("plain", plain), ("small", small)):
        top = teacher.top_k(ids, VOCABULARY, 1.0)
        found = torch.zeros_like(whole).scatter(1, top.ids, top.log_probabilities.exp())
        off[name] = 0.5 * (found - whole).abs().sum(-1).mean().item()
    assert off["plain"] < 0.02
    assert off["plain"] < off["small"] < 0.2
    assert len({plain.key, small.key}) == 2


def test_target_log_probabilities(members, torch_teacher):
    ids = windows(5)
    own = torch_teacher.target_log_probabilities(ids)
    with torch.no_grad():
        logits = members[1].model(input_ids=torch.from_numpy(ids)).logits[:, :-1, :VOCABULARY]
    expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(ids[:, 1:, None])).flatten()
    assert own.shape == (3, 5 * 11)
    np.testing.assert_allclose(own[1], expected, atol=0.1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    forms = {name: random_member(seed, tokens=258, padding=6) for seed, name in enumerate(("a", "b", "c"))}
    path = write_bundle(tmp_path_factory.mktemp("teacher") / "mixture", forms, weights=WEIGHTS)
    with Mixture.load(path, provider="cpu") as loaded:
        yield loaded, forms


@pytest.mark.parametrize("chunk", [256, 5])
def test_a_bundles_mixture(mixture, chunk, monkeypatch):
    loaded, forms = mixture
    for member in loaded.ensemble().graphs:
        monkeypatch.setattr(member, "chunk", chunk)
    teacher = RuntimeTeacher(loaded, WEIGHTS)
    ids = windows(3, vocabulary=258)
    top = teacher.top_k(ids, 6, 1.0)
    mixed = [
        np.logaddexp(*(np.log(WEIGHTS[name]) + forms[name].log_probabilities(window[:-1]) for name in ("a", "b")))
        for window in ids
    ]
    same_top(top, top_k(torch.from_numpy(np.concatenate(mixed)), 6), rtol=1e-3, atol=1e-3)
    assert teacher.key != RuntimeTeacher(loaded, {"a": 1.0}).key


def test_torch_models_teach_in_an_export_where_they_are_faster_and_say_the_same(mixture, members, monkeypatch):
    loaded, _ = mixture
    by_name = {member.name: member for member in members}

    def chosen(pays):
        monkeypatch.setattr("edgemix.export.distillation.teacher.has_fast_bfloat16", lambda device: pays)
        return teacher_in_export(loaded, WEIGHTS, by_name.__getitem__, torch.device("cpu"))

    assert isinstance(chosen(pays=False), RuntimeTeacher)
    teacher = chosen(pays=True)
    assert isinstance(teacher, TorchTeacher)
    ids = windows(2)
    monkeypatch.setattr(teacher, "vocabulary", VOCABULARY)
    same_top(teacher.top_k(ids, 5, 1.0), teacher_of(members).top_k(ids, 5, 1.0), rtol=0, atol=0)
    lossy = [msgspec.structs.replace(entry, format="int4") for entry in loaded.manifest.members]
    monkeypatch.setattr(loaded, "manifest", msgspec.structs.replace(loaded.manifest, members=tuple(lossy)))
    assert isinstance(chosen(pays=True), RuntimeTeacher)


def test_a_pruned_member_is_another_teacher(members):
    pruned = copy.deepcopy(members)
    with torch.no_grad():
        pruned[0].model.get_input_embeddings().weight[0, 0] = 0.0
    assert teacher_of(pruned).key != teacher_of(members).key


def cache(folder, teacher, ids=None, k=8, temperature=1.0):
    return TeacherCache(folder, windows() if ids is None else ids, teacher, k=k, temperature=temperature)


def test_what_is_read_is_what_the_teacher_says(torch_teacher, tmp_path):
    kept = cache(tmp_path, torch_teacher).fill()
    assert len(kept.windows) == 40
    numbers = np.array([39, 0, 17])
    read, live = kept.read(numbers), torch_teacher.top_k(kept.windows[numbers], 8, 1.0)
    same_top(read, live, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(read.events.exp().sum(-1), torch.ones(3 * 11))
    assert torch.equal(kept.tokens(numbers), torch.from_numpy(kept.windows[numbers]))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 40 * 11 * (8 * 4 + 2) + 3 * 1000


class Counting:
    """A teacher that counts the windows it is asked for, and presses Ctrl-C at one of them."""

    def __init__(self, teacher, stop=None):
        self.teacher, self.stop, self.asked = teacher, stop, 0
        self.key, self.vocabulary, self.context = teacher.key, teacher.vocabulary, teacher.context

    def top_k(self, ids, k, temperature):
        self.asked += len(ids)
        if self.stop is not None and self.asked > self.stop:
            signal.raise_signal(signal.SIGINT)
        return self.teacher.top_k(ids, k, temperature)


def test_an_interrupted_cache_goes_on(torch_teacher, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, Counting(torch_teacher, stop=16)).fill()
    again = Counting(torch_teacher)
    kept = cache(tmp_path, again).fill()
    assert len(kept.windows) == 40
    assert again.asked == 24
    whole = cache(tmp_path / "whole", torch_teacher)
    whole.fill()
    for one, other in zip(kept.read(np.arange(40)), whole.read(np.arange(40)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", [{"k": 5}, {"temperature": 2.0}, {"ids": windows(40) + 1}])
def test_another_question_is_asked_again(torch_teacher, tmp_path, change):
    cache(tmp_path, torch_teacher).fill()
    asked = Counting(torch_teacher)
    cache(tmp_path, asked, **change).fill()
    assert asked.asked == 40


def test_more_windows_keep_what_is_there(torch_teacher, tmp_path):
    cache(tmp_path, torch_teacher, windows()[:32]).fill()
    asked = Counting(torch_teacher)
    assert len(cache(tmp_path, asked).fill().windows) == 40
    assert asked.asked == 8


def test_damaged_shards_are_made_anew(torch_teacher, tmp_path):
    kept = cache(tmp_path, torch_teacher)
    kept.fill()
    shard = sorted(tmp_path.iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(EdgemixError, match="000001"):
        kept.read(np.array([20]))
    asked = Counting(torch_teacher)
    assert len(cache(tmp_path, asked).fill().windows) == 40
    assert asked.asked == 16


def test_time_is_limited_over_all_runs(torch_teacher, tmp_path, monkeypatch):
    """Each shard takes 10 seconds by the clock; a repeated call has none left."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("edgemix.export.distillation.teacher_cache.time.monotonic", lambda: next(clock))
    asked = Counting(torch_teacher)
    for _ in range(2):
        filled = cache(tmp_path, asked).fill(seconds=15)
        assert (len(filled.windows), filled.seconds_spent) == (32, 20)
    assert len(cache(tmp_path / "none", asked).fill(seconds=0).windows) == 16
    assert asked.asked == 32 + 16
