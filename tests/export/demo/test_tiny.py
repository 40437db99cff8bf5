import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgemix.export.demo.tiny import END, VOCABULARY, train_member, train_tokenizer
from edgemix.export.models.save import save_member
from edgemix.progress import NO_PROGRESS

TEXT = [f"def add_{i}(a, b):\n    return a + b + {i}\n" * 20 for i in range(30)]


class Steps:
    """A listener that keeps the notes it hears, and presses Ctrl-C at a step."""

    def __init__(self, stop_at=None):
        self.notes, self.stop_at = [], stop_at

    def __call__(self, amount=1.0, note=""):
        self.notes.append(note)
        if self.stop_at and note.startswith(f"step {self.stop_at},"):
            raise KeyboardInterrupt

    def progress(self):
        listener = type(NO_PROGRESS)()
        listener.advance = self
        return listener


def loss(note):
    return float(note.rpartition(" ")[2])


def test_a_member_learns_and_loads(tmp_path):
    tokenizer = train_tokenizer(TEXT)
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer.decode(tokenizer.encode("naïve 🙂 x\n")) == "naïve 🙂 x\n"
    heard = Steps()
    train_member(tmp_path / "code", TEXT, tokenizer, steps=25, progress=heard.progress())
    assert loss(heard.notes[-1]) < loss(heard.notes[1]) - 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "code")
    read = AutoTokenizer.from_pretrained(tmp_path / "code")
    assert read.eos_token == END
    assert read.eos_token_id == model.config.eos_token_id
    assert read.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code"]


def test_an_interrupted_member_ends_the_same(tmp_path):
    tokenizer = train_tokenizer(TEXT)
    train_member(tmp_path / "whole", TEXT, tokenizer, steps=8)
    with pytest.raises(KeyboardInterrupt):
        train_member(tmp_path / "parts", TEXT, tokenizer, steps=8, progress=Steps(stop_at=5).progress())
    train_member(tmp_path / "parts", TEXT, tokenizer, steps=8)
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_expert_goes_on_from_its_base(tmp_path):
    tokenizer = train_tokenizer(TEXT)
    base, expert = Steps(), Steps()
    train_member(tmp_path / "base", TEXT, tokenizer, steps=10, progress=base.progress())
    train_member(tmp_path / "expert", TEXT, tokenizer, start=tmp_path / "base", steps=2, progress=expert.progress())
    assert loss(expert.notes[1]) < loss(base.notes[1]) - 0.5


def test_a_license_is_stated(tmp_path):
    train_member(tmp_path / "m", TEXT, train_tokenizer(TEXT), steps=1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    save_member(model, tokenizer, tmp_path / "stated", license_id="mit")
    assert "license: mit" in (tmp_path / "stated" / "README.md").read_text()
