import json
import signal

import peft
import pytest
import torch
from helpers.finetuning_setting import OPTIONS, TEXT, eos_tokenizer, weights
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.finetuning.finetune import finetune, finetune_model
from edgemix.export.models.adapters import merge_adapter
from edgemix.export.models.location import locate
from edgemix.files import acquire_lock
from edgemix.progress import NO_PROGRESS


@pytest.fixture
def tokenizer():
    return eos_tokenizer()


@pytest.fixture
def model():
    return tiny_model("llama")


def test_the_expert_improves_and_the_base_is_unchanged(model, tokenizer, tmp_path):
    before = {name: each.clone() for name, each in model.state_dict().items()}
    report = finetune_model(model, tokenizer, tmp_path / "expert", TEXT, **OPTIONS)
    assert report.validation_after < report.validation_before - 0.5
    assert (report.steps, report.tokens) == (12, 12 * 4 * 24)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert"]


def test_the_adapter_is_a_peft_folder_on_all_projections(model, tokenizer, tmp_path):
    finetune_model(model, tokenizer, tmp_path / "expert", TEXT, **OPTIONS)
    config = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(config)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    ids = torch.arange(3, 40)[None]
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "expert").eval()
    merged = merge_adapter(tiny_model("llama"), locate(str(tmp_path / "expert"), tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-4)
        assert (merged(ids).logits - model(ids).logits).abs().max() > 0.1


def test_the_same_call_gives_the_same_bytes(model, tokenizer, tmp_path):
    for name in ("a", "b"):
        finetune_model(model, tokenizer, tmp_path / name, TEXT, **OPTIONS)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    config = "adapter_config.json"
    assert (tmp_path / "a" / config).read_text() == (tmp_path / "b" / config).read_text()


class InterruptAt:
    """A progress callback that raises Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step
        self.said = []

    def __call__(self, amount=1.0, note=""):
        if note.startswith(f"step {self.step},"):
            signal.raise_signal(signal.SIGINT)

    def progress(self):
        listener = type(NO_PROGRESS)()
        listener.advance = self
        listener.log = self.said.append
        return listener


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_call_resumes(model, tokenizer, tmp_path):
    finetune_model(model, tokenizer, tmp_path / "whole", TEXT, **OPTIONS)
    press = InterruptAt(7)
    with pytest.raises(KeyboardInterrupt):
        finetune_model(model, tokenizer, tmp_path / "parts", TEXT, **OPTIONS, progress=press.progress())
    assert "resumes" in press.said[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".parts.training"]
    finetune_model(model, tokenizer, tmp_path / "parts", TEXT, **OPTIONS)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_gpt2s_convolutions_are_linear_layers(tokenizer, tmp_path):
    report = finetune_model(tiny_model("gpt2"), tokenizer, tmp_path / "expert", TEXT, **OPTIONS)
    assert report.validation_after < report.validation_before
    merge_adapter(tiny_model("gpt2"), locate(str(tmp_path / "expert"), tmp_path))


def test_from_a_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    report = finetune(
        str(tmp_path / "base"), tmp_path / "new" / "expert", TEXT[2:], validation=TEXT[:2], steps=2, batch=2, length=16
    )
    config = json.loads((report.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def test_without_validation_text_a_part_is_held_out(model, tokenizer, tmp_path):
    report = finetune_model(model, tokenizer, tmp_path / "e", TEXT, **OPTIONS | {"steps": 1, "validation": ()})
    assert report.validation_before is None
    assert report.validation_after is None


def test_an_existing_output_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        finetune_model(model, tokenizer, tmp_path, TEXT, **OPTIONS)
    with pytest.raises(InputError, match="is there already"):
        finetune("no such model", tmp_path, TEXT)


def test_too_little_text_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="less than two tokens"):
        finetune_model(model, tokenizer, tmp_path / "expert", [""], **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_windows_are_no_longer_than_the_context(tokenizer, tmp_path):
    """opt has a table of 256 position embeddings."""
    options = OPTIONS | {"steps": 1, "batch": 1, "length": 400}
    report = finetune_model(tiny_model("opt"), tokenizer, tmp_path / "expert", TEXT, **options)
    assert report.tokens == 256


def test_a_second_run_is_refused(model, tokenizer, tmp_path):
    """Two runs with one output overwrote each other's checkpoints."""
    lock = acquire_lock(tmp_path / ".expert.lock")
    with pytest.raises(InputError, match="another run"):
        finetune_model(model, tokenizer, tmp_path / "expert", TEXT, **OPTIONS)
    lock.release()
    assert finetune_model(model, tokenizer, tmp_path / "expert", TEXT, **OPTIONS).steps == 12
