"""Loading members: folders, GGUF files, adapters, and what is refused."""

import json
import shutil

import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers

from edgemix.errors import InputError
from edgemix.export.models.loading import MemberLoader, end_ids, load_member, load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.models.tokenizers import check_rows, check_shared, describe
from edgemix.recipe.schema import MemberRecipe

TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama with a tokenizer, saved as Hugging Face folders are."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model("llama", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    """A LoRA adapter with random weights for `base`."""
    torch.manual_seed(1)
    model = load_member(MemberRecipe("m", base.name), base.parent).model
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_folder_is_loaded(base):
    member = load_member(MemberRecipe("first", "base"), base.parent)
    assert member.name == "first"
    assert member.source.model == "base"
    assert member.source.model_type == "llama"
    assert member.source.parameters == sum(p.numel() for p in member.model.parameters())
    assert member.model.dtype == torch.float32
    assert not any(p.requires_grad for p in member.model.parameters())
    assert torch.equal(logits(member.model), logits(tiny_model("llama", vocab_size=300)))


def test_adapter_is_merged_and_the_base_stays(base, adapter):
    from peft import PeftModel

    loader = MemberLoader(base.parent)
    plain = loader.load(MemberRecipe("plain", "base"))
    before = logits(plain.model)
    merged = loader.load(MemberRecipe("expert", "base", adapter="adapter"))
    again = loader.load(MemberRecipe("plain", "base"))
    expected = logits(PeftModel.from_pretrained(load_member(MemberRecipe("m", "base"), base.parent).model, adapter))
    assert torch.allclose(logits(merged.model), expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.equal(logits(again.model), before)
    assert merged.source.adapter == "adapter"
    assert merged.source.sha256 != plain.source.sha256


def test_digest_follows_the_weights(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    same = load_member(MemberRecipe("m", "base"), tmp_path).source
    assert same == load_member(MemberRecipe("m", "base"), base.parent).source
    tiny_model("llama", vocab_size=300, rms_norm_eps=1e-4).save_pretrained(tmp_path / "base")
    assert load_member(MemberRecipe("m", "base"), tmp_path).source.sha256 != same.sha256


def test_a_gguf_file_is_loaded(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    write_gguf(tmp_path / "tiny.gguf", model)
    member = load_member(MemberRecipe("m", "tiny.gguf"), tmp_path)
    assert member.source.model == "tiny.gguf"
    assert member.source.license == "mit"
    assert not hasattr(member.model.config, "quantization_config")
    assert torch.allclose(
        logits(member.model), logits(model), atol=0.2
    )  # 8-bit blocks; logits have a spread of about 1
    assert 1 in end_ids(member)
    member.model.save_pretrained(tmp_path / "copy")


def pickled(folder):
    (folder / "pickled").mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return "pickled"


def truncated(folder):
    data = (folder / "base" / "model.safetensors").read_bytes()
    (folder / "base" / "model.safetensors").write_bytes(data[: len(data) // 2])
    return "base"


def unknown(folder):
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    return "base"


def remote_code(folder):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "evil.py").write_text("raise SystemExit('ran')")
    return "base"


def text_file(folder):
    (folder / "notes.txt").write_text("hello")
    return "notes.txt"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (pickled, "no .safetensors file, only pytorch_model.bin"),
        (truncated, "cannot be read"),
        (unknown, "cannot be read"),
        (remote_code, "code of its own repository, which edgemix never runs"),
        (text_file, "not a .gguf file"),
        (lambda _: "./gone", "there is no file or folder"),
        (lambda _: "gone.gguf", "there is no file or folder"),
    ],
)
def test_unreadable_models_are_refused(base, tmp_path, spoil, words):
    shutil.copytree(base, tmp_path / "base")
    with pytest.raises(InputError, match=words):
        load_member(MemberRecipe("m", spoil(tmp_path)), tmp_path)


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such folder, and the model hub cannot be reached"):
        load_member(MemberRecipe("m", "someone/no-such-model-of-theirs"), tmp_path)


def test_other_adapters_are_refused(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(InputError, match=r"IA3 adapter|cannot be read"):
        load_member(MemberRecipe("m", "base", adapter="adapter"), tmp_path)


def test_tokenizers_that_differ_are_named():
    ours, other = tiny_tokenizer(), tiny_tokenizer(merges=(("a", "c"),))
    check_shared({"x": ours, "y": tiny_tokenizer()})
    with pytest.raises(InputError, match=r"members x and y have different tokenizers: token 'ab' is id"):
        check_shared({"x": ours, "y": other})


def test_tokenizers_that_split_differently_are_named():
    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(InputError, match="is encoded with"):
        check_shared({"x": tiny_tokenizer(), "y": other})


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\u0301", "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
)
def test_rules_that_split_a_few_characters_differently_are_found(pre_tokenizer):
    """Six probes let differences pass that change the ids of few texts (rten 453)."""
    merges = tuple((left, right) for left in "Ġ'1aĊ" for right in sorted(pre_tokenizers.ByteLevel.alphabet()))
    ours, other = tiny_tokenizer(merges=merges), tiny_tokenizer(merges=merges)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizer
    with pytest.raises(InputError, match="is encoded with"):
        check_shared({"x": ours, "y": other})


def test_rules_that_are_written_differently_may_be_the_same():
    other = tiny_tokenizer()
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    check_shared({"x": tiny_tokenizer(), "y": other})


def test_only_added_tokens_may_lack_rows():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_rows(tokenizer, 259, "m")
    with pytest.raises(InputError, match="member m: the model has 258 logits, but its tokenizer has 259"):
        check_rows(tokenizer, 258, "m")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "Precompiled: its trie"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}, "PanicException"),
    ],
    ids=["abort", "panic"],
)
def test_a_tokenizer_that_native_code_cannot_bear_is_refused(tmp_path, part, words):
    """The first aborted the export, the second ended it with a traceback: a panic is no Exception."""
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | part))
    with pytest.raises(InputError, match=words):
        load_tokenizer(locate(str(tmp_path), tmp_path))


def test_an_end_token_that_the_model_lacks_is_none(tmp_path):
    """Qwen2Tokenizer adds one by itself, and text that it separates could not be read by the model."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path)
    for rows, expected in ((260, "<|endoftext|>"), (259, None)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
        assert load_tokenizer(locate(str(tmp_path), tmp_path)).eos_token == expected


def test_the_tokenizer_entry_describes_the_tokenizer():
    entry = describe(tiny_tokenizer(), {1})
    assert (entry.vocabulary, entry.eos, entry.bos) == (259, (1,), None)
    assert describe(tiny_tokenizer(bos=True), {1}).bos == 0
