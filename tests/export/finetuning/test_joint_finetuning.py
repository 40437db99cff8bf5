import json
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import peft
import pytest
import torch
from helpers.finetuning_setting import eos_tokenizer, weights
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.finetuning.finetune import finetune_model
from edgemix.export.finetuning.joint import finetune_mixture
from edgemix.export.finetuning.members import load_trainable_members
from edgemix.export.finetuning.mixture_likelihood import MixtureLikelihood
from edgemix.export.finetuning.options import TrainingSettings
from edgemix.export.models.adapters import merge_adapter
from edgemix.export.models.loading import load_model
from edgemix.export.models.location import locate
from edgemix.recipe.load import load_recipe
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource


@pytest.fixture
def tokenizer():
    return eos_tokenizer()


ANIMALS = [f"the {a} sat on the {b}, and all was well with the {a}.\n" * 8
           for a in ("cat", "dog", "owl", "fox", "hen") for b in ("mat", "log", "bough", "wall")]  # fmt: skip
NUMBERS = [f"{a} + {b} = {a + b}; {b} + {a} = {a + b}; {a} * {b} = {a * b};\n" * 8
           for a in range(11, 16) for b in range(21, 25)]  # fmt: skip
TEXTS = {"animals": ANIMALS, "numbers": NUMBERS}
OPTIONS = {"rank": 4, "steps": 12, "batch": 4, "length": 24, "learning_rate": 1e-2}


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """Two members on one base, and one on another."""
    for name, model in (("base", tiny_model("llama")), ("gpt2", tiny_model("gpt2"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    members = tuple(MemberRecipe(name, "base") for name in TEXTS)
    return Recipe(members=members, folder=tmp_path)


def test_joint_training_beats_separate_training_on_mixed_text(recipe, tmp_path):
    """Separate training takes as many steps per member, joint training half as many in total."""
    options = OPTIONS | {"steps": 30}
    joint = finetune_mixture(recipe, tmp_path / "joint", TEXTS, **options)
    alone = finetune_mixture(recipe, tmp_path / "alone", TEXTS, separate=True, **options)
    assert (joint.steps, alone.steps) == (30, 60)
    assert joint.validation_before == alone.validation_before
    assert joint.validation_after < alone.validation_after - 0.1
    assert joint.validation_after < min(member.validation_after for member in joint.members) - 0.1


def test_members_share_their_base_and_learn_by_responsibility(recipe):
    """Only one adapter is active at a time, but gradients must reach all of them."""
    members = (*recipe.members, MemberRecipe("other", "gpt2"))
    ids = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.2, 0.5, 0.3])
    with load_trainable_members(msgspec.structs.replace(recipe, members=members), TrainingSettings(rank=4)) as opened:
        assert opened[0].model is opened[1].model
        for index, member in enumerate(opened):
            with torch.no_grad():
                for parameter in member.parameters.values():
                    parameter.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.1)
        loss = MixtureLikelihood([member.losses for member in opened], shares)(ids)
        parameters = [list(member.parameters.values()) for member in opened]
        gradients = [torch.autograd.grad(loss, each, retain_graph=True) for each in parameters]
        losses = [member.losses(ids) for member in opened]
        joint = shares[:, None] * torch.stack(losses).detach().neg().exp()
        for own, responsibility, each, found in zip(losses, joint / joint.sum(0), parameters, gradients, strict=True):
            wanted = torch.autograd.grad((own * responsibility).mean(), each)
            assert max(part.abs().max() for part in found) > 1e-4
            for gradient, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_one_member_is_plain_fine_tuning(recipe, tokenizer, tmp_path, separate):
    recipe = msgspec.structs.replace(recipe, members=recipe.members[:1])
    report = finetune_mixture(recipe, tmp_path / "mixture", {"animals": ANIMALS}, separate=separate, **OPTIONS)
    plain = finetune_model(tiny_model("llama"), tokenizer, tmp_path / "p", ANIMALS, base_name="base", **OPTIONS)
    assert weights(tmp_path / "mixture" / "animals") == weights(tmp_path / "p")
    config = "adapter_config.json"
    assert (tmp_path / "mixture" / "animals" / config).read_text() == (tmp_path / "p" / config).read_text()
    assert (report.training_loss, report.steps, report.tokens) == (plain.training_loss, plain.steps, plain.tokens)
    assert report.validation_after == pytest.approx(plain.validation_after, rel=1e-5)
    assert report.members[0].parameters == plain.parameters


def test_separate_members_learn_from_the_domain_of_their_name(recipe, tokenizer, tmp_path):
    """Members without such a domain learn from all text."""
    recipe = msgspec.structs.replace(recipe, members=(recipe.members[0], MemberRecipe("general", "base")))
    report = finetune_mixture(recipe, tmp_path / "alone", TEXTS, separate=True, **OPTIONS)
    finetune_model(tiny_model("llama"), tokenizer, tmp_path / "plain", ANIMALS, base_name="base", **OPTIONS)
    assert weights(tmp_path / "alone" / "animals") == weights(tmp_path / "plain")
    assert report.members[1].validation_after < report.members[0].validation_after - 0.1


def test_paths_in_the_new_recipe_are_relative_to_it(recipe, tmp_path):
    (tmp_path / "animals.txt").write_text("".join(ANIMALS))
    (tmp_path / "held-out.txt").write_text("the cat sat on the wall, and all was well\n" * 20)
    data = Data(
        validation={"a": TextSource("held-out.txt")}, training={"animals": TextSource("animals.txt")}, window=64
    )
    members = (*recipe.members, MemberRecipe("other", "gpt2", format="int4"))
    recipe = msgspec.structs.replace(recipe, members=members, data=data, weights="fit", format="fp32", seed=3)
    report = finetune_mixture(recipe, tmp_path / "new" / "tuned", **OPTIONS)

    found = load_recipe(report.recipe)
    assert "tmp" not in report.recipe.read_text()
    assert [(member.name, member.model, member.adapter, member.format) for member in found.members] == [
        ("animals", "../../base", "animals", None),
        ("numbers", "../../base", "numbers", None),
        ("other", "../../gpt2", "other", "int4"),
    ]
    assert (found.weights, found.format, found.seed, found.data.window) == ("fit", "fp32", 3, 64)
    assert found.data.training["animals"].file == "../../animals.txt"
    assert found.data.validation["a"].file == "../../held-out.txt"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tuned"]
    assert report.validation_after < report.validation_before - 0.3
    for member in found.members:
        model = load_model(locate(member.model, found.folder))
        merge_adapter(model, locate(member.adapter, found.folder))


def test_a_member_continues_from_its_adapter(recipe, tmp_path):
    first = finetune_mixture(recipe, tmp_path / "first", TEXTS, **OPTIONS)
    again = load_recipe(first.recipe)
    second = finetune_mixture(again, tmp_path / "second", TEXTS, **OPTIONS | {"rank": 2})
    assert second.validation_before == pytest.approx(first.validation_after, rel=1e-5)
    assert second.validation_after < first.validation_after - 0.1
    for name in TEXTS:
        config = json.loads((tmp_path / "second" / name / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (4, "base")


class Listener:
    """A progress callback that records step notes and raises Ctrl-C at one of them."""

    def __init__(self, title="", step=0):
        self.press = (title, step)
        self.steps = []

    @contextmanager
    def stage(self, title, total=None):
        def advance(amount=1.0, note=""):
            if note.startswith("step"):
                self.steps.append((title.split(":")[0], int(note.split()[1].strip(","))))
                if self.steps[-1] == self.press:
                    signal.raise_signal(signal.SIGINT)

        yield SimpleNamespace(advance=advance)

    def log(self, line):
        pass


@pytest.mark.parametrize("separate", [False, True])
def test_an_interrupted_run_gives_the_same_result(recipe, tmp_path, separate):
    """Adapters and weights are bitwise equal; a finished member is not trained again."""
    options = OPTIONS | {"separate": separate, "fit_weights": not separate}
    whole = finetune_mixture(recipe, tmp_path / "whole", TEXTS, **options)
    title = "numbers" if separate else "mixture"
    with pytest.raises(KeyboardInterrupt):
        finetune_mixture(recipe, tmp_path / "parts", TEXTS, **options, progress=Listener(title, 7))
    assert {path.name for path in tmp_path.iterdir()} - {"base", "gpt2", "whole"} == {".parts.checkpoints"}
    heard = Listener()
    parts = finetune_mixture(recipe, tmp_path / "parts", TEXTS, **options, progress=heard)
    assert heard.steps == [("animals", 12)] * separate + [(title, step) for step in range(7, 13)]
    for name in TEXTS:
        assert weights(tmp_path / "parts" / name) == weights(tmp_path / "whole" / name)
    assert (tmp_path / "parts" / "recipe.yaml").read_text() == (tmp_path / "whole" / "recipe.yaml").read_text()
    assert [member.weight for member in parts.members] == [member.weight for member in whole.members]
    assert not (tmp_path / ".parts.checkpoints").exists()


def test_weights_are_fitted_during_training(recipe, tmp_path):
    """The member that was trained on animals gets most of the weight on mostly animal text."""
    start = finetune_mixture(recipe, tmp_path / "start", TEXTS, separate=True, **OPTIONS | {"steps": 30})
    text = {"both": [*ANIMALS, *NUMBERS[:4]]}
    report = finetune_mixture(load_recipe(start.recipe), tmp_path / "out", text, fit_weights=True, **OPTIONS)
    shares = {member.name: member.weight for member in report.members}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert shares["animals"] > 0.6
    assert load_recipe(report.recipe).weights == pytest.approx(shares)
    kept = finetune_mixture(load_recipe(start.recipe), tmp_path / "kept", text, **OPTIONS)
    assert load_recipe(kept.recipe).weights == "uniform"
    assert report.validation_after < kept.validation_after


def test_a_member_with_zero_weight_is_refused(recipe, tmp_path):
    unheard = msgspec.structs.replace(recipe, weights={"animals": 1.0, "numbers": 0.0})
    with pytest.raises(InputError, match="weight of numbers is zero"):
        finetune_mixture(unheard, tmp_path / "out", TEXTS, **OPTIONS)
    assert finetune_mixture(unheard, tmp_path / "out", TEXTS, separate=True, **OPTIONS | {"steps": 1}).steps == 2


def test_missing_text_and_an_existing_output_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="names no text"):
        finetune_mixture(recipe, tmp_path / "out", **OPTIONS)
    with pytest.raises(InputError, match="is there already"):
        finetune_mixture(recipe, tmp_path / "base", TEXTS, **OPTIONS)


def test_an_adapter_that_trains_more_than_lora_is_refused(recipe, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"])
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "whole-head")
    members = (MemberRecipe("a", "base", adapter="whole-head"), recipe.members[1])
    with pytest.raises(InputError, match=r"also changes .*lm_head"):
        finetune_mixture(msgspec.structs.replace(recipe, members=members), tmp_path / "out", TEXTS, **OPTIONS)
    assert not (tmp_path / "out").exists()
