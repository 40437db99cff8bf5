"""Distillation as a whole: the student comes close to the mixture, and nothing is lost when it is interrupted."""

from __future__ import annotations

import json
import os
import re
import signal

import msgspec
import numpy as np
import pytest
import torch
from helpers.distillation_setting import LENGTH, TEXTS, recipe_in, write_setting
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgemix.errors import InputError, RecipeError
from edgemix.export.data.text import windows
from edgemix.export.distillation import distill as module
from edgemix.export.distillation.distill import distill, make_student
from edgemix.export.distillation.head_loss import objective_loss
from edgemix.export.distillation.loss import DistillationLoss, mean_loss
from edgemix.export.distillation.samples import PROMPT, generate_windows
from edgemix.export.distillation.teacher import RuntimeTeacher, open_teacher
from edgemix.export.distillation.teacher_cache import TeacherCache
from edgemix.export.distillation.texts import read_texts
from edgemix.export.models.loading import load_model, load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.pipeline import export_bundle
from edgemix.export.pruning.sparsity import linears
from edgemix.export.training.loop import TrainingBudget
from edgemix.export.training.losses import Objective
from edgemix.progress import NO_PROGRESS
from edgemix.recipe.compression import Pruning
from edgemix.runtime import Mixture


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def teacher(setting):
    with open_teacher(recipe_in(setting), None, torch.device("cpu")) as (found, _):
        yield found


@pytest.fixture(scope="module")
def held_out(setting, teacher, tmp_path_factory):
    """The mixture's distributions on text that is in no recipe's training text."""
    tokenizer = load_tokenizer(locate("animals", setting))
    texts = [text for texts in TEXTS.values() for text in texts[1::2]]
    ids = np.array(windows(texts, tokenizer, LENGTH, seed=0))[:24]
    return TeacherCache(tmp_path_factory.mktemp("held-out"), ids, teacher, k=64, temperature=1.0).fill()


def distance(folder, held_out, teacher):
    """KL(mixture || student), nats a token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return mean_loss(model, objective_loss(model, Objective(), teacher.vocabulary), held_out)


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_student_is_a_folder_that_comes_closer_to_the_mixture(setting, tmp_path, held_out, teacher):
    report = distill(recipe_in(setting, steps=40), tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("the cat").input_ids == load_tokenizer(locate("animals", setting))("the cat").input_ids
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "student").config
    assert "edgemix_decoding" not in config.to_dict()
    assert (report.layers, report.steps, report.tokens) == (2, 40, 40 * 4 * LENGTH)
    assert report.weights == pytest.approx({"animals": 0.6, "numbers": 0.4})
    assert report.held_out < 0.8 * report.held_out_before
    assert report.teacher_tokens > 20 * LENGTH
    alone = distill(recipe_in(setting, steps=40, alpha=0.0), tmp_path / "alone")
    assert alone.held_out < alone.held_out_before
    close, far = (distance(tmp_path / name, held_out, teacher) for name in ("student", "alone"))
    assert close < 0.8 * far


class Stop:
    """Progress that presses Ctrl-C when a stage has advanced so far."""

    def __init__(self, stage, after):
        self.title, self.left = stage, after
        self.here = False

    def progress(self):
        listener = type(NO_PROGRESS)()
        stage = listener.stage

        def opened(title, total=None):
            self.here = title == self.title
            return stage(title, total)

        def advance(amount=1.0, note=""):
            self.left -= self.here
            if self.here and self.left == 0:
                signal.raise_signal(signal.SIGINT)

        listener.stage, listener.advance = opened, advance
        return listener


@pytest.mark.parametrize("options", [{}, {"samples": 0.5, "accumulate": 2, "eight_bit_optimizer": True}])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(setting, tmp_path, options):
    recipe = recipe_in(setting, steps=8, **options)
    whole = distill(recipe, tmp_path / "whole")
    for stage, after in (("fit layers", 1), ("teacher", 2), ("distill", 4), ("distill", 3)):
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, tmp_path / "parts", progress=Stop(stage, after).progress())
        assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".parts.distilling"]
    parts = distill(recipe, tmp_path / "parts")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert (parts.steps, parts.training_loss, parts.held_out) == (whole.steps, whole.training_loss, whole.held_out)
    assert parts.held_out_before == whole.held_out_before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_beginning_that_is_not_whole_is_made_again(setting, tmp_path, name):
    """A file that a power cut had shortened ended in a safetensors or a JSON error, at every further try."""
    recipe = recipe_in(setting, steps=2)
    whole = distill(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "parts", progress=Stop("distill", 1).progress())
    (start,) = (tmp_path / ".parts.distilling").glob("start-*")
    os.truncate(start / name, 100)
    assert distill(recipe, tmp_path / "parts").held_out == whole.held_out


@pytest.mark.parametrize("change", [{"loss": "reverse"}, {"loss": "skewed"}, {"loss": "total-variation"},
                                    {"temperature": 2.0, "alpha": 0.7}])  # fmt: skip
def test_every_loss_brings_the_student_closer(setting, tmp_path, held_out, teacher, change):
    report = distill(recipe_in(setting, steps=25, **change), tmp_path / "after")
    assert report.held_out < report.held_out_before
    # With a temperature and text, the loss itself is another measure; this is the mixture's own.
    distill(recipe_in(setting, steps=1, learning_rate=1e-9), tmp_path / "before")
    before, after = (distance(tmp_path / name, held_out, teacher) for name in ("before", "after"))
    assert after < 0.8 * before


def test_weights_are_fitted_where_the_recipe_says_so(setting, tmp_path):
    recipe = msgspec.structs.replace(recipe_in(setting, steps=1), weights="fit")
    only = {"animals": recipe.data.validation["animals"]}
    recipe = msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, validation=only))
    assert distill(recipe, tmp_path / "student").weights["animals"] > 0.9


def test_minutes_are_shared_between_teacher_and_student(setting, tmp_path, monkeypatch):
    """The clock says 4 seconds a shard of 2 windows. A student that learns four times as fast as the teacher speaks
    reads all of it twice when the teacher has two thirds of the time, and the student what is left.
    """

    def seconds(cache, shard, real=TeacherCache.shard_seconds):
        return None if real(cache, shard) is None else 4.0

    def ask(cache, shard, real=TeacherCache.write_shard):
        real(cache, shard)
        return 4.0

    def train(*arguments, budget, **options):
        budgets.append(budget)
        return module_train(*arguments, budget=TrainingBudget(3), **options)

    budgets, module_train = [], module.train
    length = recipe_in(setting).student.length
    monkeypatch.setattr(module, "training_speed", lambda *_: 4 * 2 * length / 4.0)
    monkeypatch.setattr("edgemix.export.distillation.teacher_cache.SHARD", 2)
    monkeypatch.setattr(TeacherCache, "shard_seconds", seconds)
    monkeypatch.setattr(TeacherCache, "write_shard", ask)
    monkeypatch.setattr(module, "train", train)
    report = distill(recipe_in(setting, steps=None, minutes=1.0), tmp_path / "student")
    assert 40 <= report.teacher_seconds <= 48
    assert budgets[0].steps is None
    assert budgets[0].seconds == pytest.approx(60 - report.teacher_seconds)


def test_a_student_from_a_configuration_learns(setting, tmp_path):
    load_model(locate("animals", setting)).config.save_pretrained(tmp_path / "own")
    recipe = recipe_in(setting, config=str(tmp_path / "own"), steps=20)
    report = distill(recipe, tmp_path / "student")
    assert report.decoding is None
    assert report.layers == 6
    assert report.held_out < report.held_out_before - 1


@pytest.mark.parametrize("options", [{}, {"eight_bit_optimizer": True, "steps": 2}])
def test_zeros_that_the_recipe_asks_for_are_there_in_the_end(setting, tmp_path, options):
    """`sparsity` and `pattern` of a student's `prune` were passed over in silence."""
    prune = Pruning(layers=0.5, pattern="2:4")
    distill(recipe_in(setting, prune=prune, **options), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert model.config.num_hidden_layers == 3
    for part in linears(model).values():
        assert bool(((part.weight.reshape(-1, 4) == 0).sum(1) == 2).all())


def test_a_bundle_teaches(setting, tmp_path):
    """The runtime's mixture and torch's are one mixture: students of both are nearly the same."""
    recipe = msgspec.structs.replace(recipe_in(setting, steps=3), format="fp32")
    plain = msgspec.structs.replace(recipe, student=None)
    export_bundle(plain, tmp_path / "bundle")
    ours = distill(recipe, tmp_path / "ours", bundle=tmp_path / "bundle")
    torchs = distill(recipe, tmp_path / "torchs")
    assert ours.weights == pytest.approx(torchs.weights)
    assert ours.held_out == pytest.approx(torchs.held_out, rel=0.02)

    with Mixture.load(tmp_path / "bundle", provider="cpu") as mixture:
        teacher = RuntimeTeacher(mixture, mixture.weights)
        folder = make_student(recipe, mixture.weights, teacher, tmp_path / "work")
        assert weights_of(folder) == weights_of(tmp_path / "ours")
        (tmp_path / "work" / "teacher" / "training" / "000000.safetensors").unlink()
        again = make_student(recipe, mixture.weights, teacher, tmp_path / "work")
        assert again == folder
        assert not (tmp_path / "work" / "teacher" / "training" / "000000.safetensors").exists()
        other = msgspec.structs.replace(recipe, seed=1)
        before = weights_of(folder)
        assert weights_of(make_student(other, mixture.weights, teacher, tmp_path / "work")) != before


def test_a_bundle_with_another_tokenizer_does_not_teach(setting, tmp_path, own_bundle):
    """Its distributions were over other tokens, and the student learned them all the same."""
    with pytest.raises(InputError, match="has another tokenizer than animals"):
        distill(recipe_in(setting), tmp_path / "student", bundle=own_bundle)


def test_what_is_there_already_is_kept(setting, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        distill(recipe_in(setting), tmp_path)
    with pytest.raises(RecipeError, match="alpha"):
        distill(recipe_in(setting, alpha=3.0), tmp_path / "student")


def test_texts_take_turns_and_what_is_held_out_is_not_learned(setting):
    tokenizer = load_tokenizer(locate("animals", setting))
    texts = read_texts(recipe_in(setting), tokenizer, LENGTH, 10**6)
    first = [tokenizer.decode(window) for window in texts.training[:6]]
    assert ["plus" in text for text in first] == [False, True] * 3
    learned = {tuple(window) for window in texts.training.tolist()}
    assert not learned & {tuple(window) for window in texts.held_out.tolist()}
    assert len(texts.held_out) >= 2
    assert len(read_texts(recipe_in(setting), tokenizer, LENGTH, 3 * LENGTH).training) == 3


def test_a_long_document_gives_windows_from_all_over_it(setting, tmp_path):
    """A student of few minutes read three or four documents' beginnings, and was validated on one."""
    tokenizer = load_tokenizer(locate("animals", setting))
    lines = [f"{i} plus {i} is {2 * i}.\n" for i in range(4000)]
    for name in TEXTS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "".join(lines)}))
    texts = read_texts(recipe_in(tmp_path), tokenizer, LENGTH, 8 * LENGTH)
    for part, spread in ((texts.training, 1000), (texts.held_out, 200)):  # what is held out is a piece or two
        found = [re.search(r"(\d+) plus \1 is", tokenizer.decode(window)) for window in part]
        firsts = np.array([int(match[1]) for match in found if match])
        assert len(firsts) >= 4
        assert np.ptp(firsts) > spread


def test_too_little_text(setting):
    tokenizer = load_tokenizer(locate("animals", setting))
    with pytest.raises(InputError, match=r"data\.training\.animals"):
        read_texts(recipe_in(setting), tokenizer, 100_000, 10**6)


def test_the_student_writes_from_its_own_distribution(setting):
    model = load_model(locate("animals", setting))
    ids = torch.randint(1, 200, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    written = generate_windows(model, ids, 250)
    begin = int(PROMPT * LENGTH)
    assert torch.equal(written[:, :begin], ids[:, :begin])
    assert not torch.equal(written[:, begin:], ids[:, begin:])
    assert written.max() < 250
    # The same draws, one token after the other without a cache.
    torch.manual_seed(5)
    again = ids.clone()
    with torch.no_grad():
        for at in range(begin, LENGTH):
            again[:, at] = torch.multinomial(model(again[:, :at]).logits[:, -1, :250].softmax(-1), 1)[:, 0]
    assert torch.equal(written, again)


def test_the_share_of_samples_in_the_second_half(setting, teacher, tmp_path):
    model = load_model(locate("animals", setting))
    ids = np.random.default_rng(0).integers(1, 200, (8, LENGTH))
    cache = TeacherCache(tmp_path, ids, teacher, k=8, temperature=1.0).fill()
    asked = []

    class Asked:
        key, vocabulary, context = teacher.key, teacher.vocabulary, teacher.context

        def top_k(self, ids, k, temperature):
            asked.append(ids)
            return teacher.top_k(ids, k, temperature)

    loss = DistillationLoss(
        model, cache, Objective("forward", 0.5), teacher.vocabulary, teacher=Asked(), samples=0.3, k=8
    )
    numbers = torch.arange(8)[:, None]
    torch.manual_seed(0)
    loss.before_step(0.49)
    first = loss(numbers)
    assert not asked
    loss.before_step(0.5)
    for _ in range(20):
        value = loss(numbers)
    assert torch.isfinite(value)
    assert value != first
    assert sum(map(len, asked)) / (20 * 8) == pytest.approx(0.3, abs=0.04)
    assert all((some[:, : LENGTH // 4] == ids[: len(some), : LENGTH // 4]).all() for some in asked)
