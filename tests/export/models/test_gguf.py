"""GGUF files: what they state is what is loaded, or they are refused by name."""

import numpy as np
import pytest
import torch
from helpers.gguf_files import as_they_are, write_gguf
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.errors import InputError
from edgemix.export.models.gguf_pretokenizers import PRE_TOKENIZERS
from edgemix.export.models.loading import end_ids, load_member, load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.models.tokenizers import chat_template, check_shared, leading_token
from edgemix.recipe.schema import MemberRecipe

TOKENS = torch.arange(3, 203)[None]
"""Long enough for scaled positions to matter."""


def llama(**options):
    return tiny_model("llama", vocab_size=300, **options)


def load(path):
    return load_member(MemberRecipe("m", path.name), path.parent)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A valid file's bytes."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(path, llama())
    return path.read_bytes()


def test_links_keep_their_names(tmp_path, whole):
    """mesh-llm 1725: hubs keep a file as blobs/SHA and link it by its name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs" / "abc123").write_bytes(whole)
    (tmp_path / "snapshots" / "m.gguf").symlink_to("../blobs/abc123")
    assert load(tmp_path / "snapshots" / "m.gguf").source.model == "m.gguf"


def test_one_part_of_several_is_refused(tmp_path):
    """transformers 32266: the layers of the other parts were random."""
    path = tmp_path / "m-00001-of-00003.gguf"
    write_gguf(path, llama(), metadata={"split.count": 3, "split.no": 0})
    with pytest.raises(InputError, match=r"m-00001-of-00003\.gguf: only part 1 of 3") as caught:
        load(path)
    assert "llama-gguf-split --merge" in caught.value.remedy


FACTORS = np.linspace(1, 5, 8).astype(np.float32)


def llama3_factors(config):
    """What the converter writes as rope_freqs: by how much each frequency is divided."""
    plain = 1 / config.rope_parameters["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    return (plain / llama(rope_parameters=config.rope_parameters).model.rotary_emb.inv_freq.numpy()).astype(np.float32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "metadata", "factors"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}, None),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            None,
        ),
        (LLAMA3 | {"original_max_position_embeddings": 64}, {}, llama3_factors),
        (
            {
                "rope_type": "longrope",
                "short_factor": FACTORS.tolist(),
                "long_factor": FACTORS.tolist(),
                "original_max_position_embeddings": 256,
            },
            {},
            lambda _: FACTORS,
        ),
        ({"rope_type": "default", "rope_theta": 500_000.0}, {"rope.freq_base": 500_000.0}, None),
    ],
    ids=["linear", "old linear", "none", "yarn", "llama3", "other factors", "base"],
)
def test_rotary_embeddings_are_those_of_the_file(tmp_path, rope, metadata, factors):
    """mobius 458, llama.cpp 8676: scaling and rope_freqs were not read."""
    model = llama(rope_parameters={"rope_theta": 10_000.0} | rope)
    tensors = {"rope_freqs.weight": factors(model.config)} if factors else None
    write_gguf(tmp_path / "m.gguf", model, as_they_are, metadata=metadata, tensors=tensors)
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf").model), logits(model), atol=1e-3, rtol=0)


def test_every_end_token_ends_a_generation(tmp_path):
    """mistral.rs 1012: only eos_token_id ended one, so that chats ran on."""
    tokens = ("<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<turn>")
    metadata = {"tokenizer.ggml.eot_token_id": 264, "tokenizer.ggml.eom_token_id": 265}
    write_gguf(tmp_path / "m.gguf", llama(), metadata=metadata, tokens=tokens)
    assert end_ids(load(tmp_path / "m.gguf")) == {1, 259, 260, 261, 264, 265}


def test_a_token_within_turns_does_not_end_a_generation(tmp_path):
    """In the vocabularies of gpt-oss <|end|> ends a message, after which the model goes on."""
    write_gguf(tmp_path / "m.gguf", llama(), tokens=("<|return|>", "<|call|>", "<|end|>"))
    assert end_ids(load(tmp_path / "m.gguf")) == {1, 259, 260}


@pytest.mark.parametrize(
    ("metadata", "first", "last"),
    [
        ({}, None, None),
        ({"tokenizer.ggml.add_bos_token": True}, 0, None),
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}, None, 1),
        ({"tokenizer.ggml.pre": "llama-bpe"}, 0, None),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, None, None),
    ],
)
def test_special_tokens_surround_a_text_as_the_file_says(tmp_path, metadata, first, last):
    template = "{{ messages[0].content }}"
    write_gguf(tmp_path / "m.gguf", llama(), metadata=metadata | {"tokenizer.chat_template": template})
    tokenizer = load_tokenizer(locate("m.gguf", tmp_path))
    ids = tokenizer("xyz")["input_ids"]
    assert leading_token(tokenizer) == first
    assert ids[-1] == 1 if last else ids[-1] > 1
    assert chat_template(tokenizer) == template
    assert len(tokenizer) == 300


LIST = "List:\n\n1. a = 12345 +  5\n\nit's"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "List|:|Ċ|Ċ|1|.|Ġa|Ġ=|Ġ12345|Ġ+|Ġ|Ġ5|Ċ|Ċ|it|'s"),
        ("smollm", "List|:|ĊĊ|1|.|Ġa|Ġ=|Ġ|1|2|3|4|5|Ġ+|ĠĠ|5|Ċ|Ċ|it|'s"),
        ("llama-bpe", "List|:ĊĊ|1|.|Ġa|Ġ=|Ġ|123|45|Ġ+|Ġ|Ġ|5|ĊĊ|it|'s"),
        ("qwen2", "List|:ĊĊ|1|.|Ġa|Ġ=|Ġ|1|2|3|4|5|Ġ+|Ġ|Ġ|5|ĊĊ|it|'s"),
        ("default", "List|:|Ċ|Ċ|1|.|Ġa|Ġ|=|Ġ|123|45|Ġ|+|Ġ|Ġ|5|Ċ|Ċ|it|'|s"),
        ("falcon", "List|:|Ċ|Ċ|1|.|Ġa|Ġ|=|Ġ|123|45|Ġ|+|Ġ|Ġ|5|Ċ|Ċ|it|'|s"),
        ("deepseek-v3", "List|:ĊĊ|1|.|Ġa|Ġ=|Ġ|123|45|Ġ+|ĠĠ|5|ĊĊ|it|'s"),
        ("deepseek-coder", "List|:|Ċ|Ċ|1|.|Ġa|Ġ=Ġ|1|2|3|4|5|Ġ+ĠĠ|5|Ċ|Ċ|it|'|s"),
        ("gpt-4o", "List|:ĊĊ|1|.|Ġa|Ġ=|Ġ|123|45|Ġ+|Ġ|Ġ|5|ĊĊ|it's"),
        ("tekken", "List|:ĊĊ|1|.|Ġa|Ġ=|Ġ|1|2|3|4|5|Ġ+|Ġ|Ġ|5|ĊĊ|it|'s"),
        ("bloom", "List:|ĊĊ|1|.|Ġa|Ġ=|Ġ12345|Ġ+|Ġ|Ġ5|ĊĊ|it's"),
        ("viking", "List:|ĊĊ|1|.|Ġa|Ġ=|Ġ|1|2|3|4|5|Ġ+|Ġ|Ġ|5|ĊĊ|it's"),
    ],
)
def test_texts_are_cut_as_the_pre_tokenizer_says(name, pieces):
    """llama.cpp 8609: names that transformers does not know got GPT-2's rule."""
    cut = PRE_TOKENIZERS[name].build().pre_tokenize_str(LIST)
    assert "|".join(piece for piece, _ in cut) == pieces


@pytest.mark.parametrize("name", sorted({id(row): name for name, row in PRE_TOKENIZERS.items()}.values()))
def test_no_pre_tokenizer_loses_text(tmp_path, name):
    text = "naïve 日本語 12345, x²  \r\n\tfoo(bar) don't DON'T [ÀÉ]\u0600٣ 🙂 "
    write_gguf(tmp_path / "m.gguf", llama(), metadata={"tokenizer.ggml.pre": name})
    tokenizer = load_tokenizer(locate("m.gguf", tmp_path))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_unknown_tokenizers_are_refused(tmp_path):
    for metadata, words in (
        ({"tokenizer.ggml.pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2'"),
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv'"),
        ({"tokenizer.ggml.merges": ["a b", "a zz"]}, "merge 'a zz'"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
    ):
        write_gguf(tmp_path / "m.gguf", llama(), metadata=metadata)
        with pytest.raises(InputError, match=words):
            load(tmp_path / "m.gguf")


def test_a_folder_of_the_same_model_has_the_same_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    write_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=259))
    check_shared({"folder": tokenizer, "file": load_tokenizer(locate("m.gguf", tmp_path))})
