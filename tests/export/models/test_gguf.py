"""GGUF files: what they state is what is loaded, or they are refused by name."""

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers.gguf_files import as_they_are, write_gguf
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.errors import InputError
from edgemix.export.models.gguf_header import gguf_header
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


HEADS = {"attention.key_length": 32, "attention.value_length": 32}
CAPS = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 1.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
SHARED = EXPERT_KEYS | {"expert_shared_feed_forward_length": 64}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("kind", "options", "metadata"),
    [
        ("llama", {"rms_norm_eps": 1e-2}, {"general.name": "mistral"}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("llama", {"head_dim": 32}, HEADS | {"rope.dimension_count": 32}),
        ("llama-tied", {}, {}),
        ("qwen2", {"tie_word_embeddings": False}, {}),
        ("qwen3", {}, HEADS),
        ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}, SHARED),
        ("qwen3_moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}, EXPERT_KEYS),
        (
            "gemma2",
            {"query_pre_attn_scalar": 32, **CAPS},
            HEADS | CAPS | {"attention.sliding_window": 16},
        ),
        (
            "gemma3_text",
            {
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 16,
                "num_hidden_layers": 6,
                "rope_parameters": GEMMA3_ROPE,
            },
            HEADS
            | {"attention.sliding_window": 16, "rope.freq_base": 1e6}
            | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        ),
        ("phi3", {"sliding_window": 16}, {"attention.sliding_window": 16}),
        ("gpt2", {}, {}),
        ("stablelm", {}, {"rope.dimension_count": 16}),
        ("starcoder2", {}, {}),
        ("falcon", {}, {}),
        ("bloom", {}, {}),
        ("nemotron", {}, {"rope.dimension_count": 8}),
    ],
)
def test_architectures_compute_what_their_folders_do(tmp_path, kind, options, metadata):
    """What the metadata state is set: window, caps, sizes of heads, biases; transformers has defaults for them."""
    model = tiny_model(kind, vocab_size=300, **options)
    write_gguf(tmp_path / "m.gguf", model, as_they_are, metadata=metadata)
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf").model), logits(model), atol=1e-4, rtol=0)


def test_phi3_reads_its_factors(tmp_path):
    """mobius 458: factors for short and long texts are tensors of the file."""
    long = (FACTORS * 2).tolist()
    scaling = {"short_factor": FACTORS.tolist(), "long_factor": long, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "attention_factor": 1.25, **scaling}
    model = tiny_model("phi3", vocab_size=300, original_max_position_embeddings=64, rope_parameters=rope)
    tensors = {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS}
    metadata = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
    write_gguf(tmp_path / "m.gguf", model, as_they_are, metadata=metadata, tensors=tensors)
    loaded = load(tmp_path / "m.gguf").model
    for tokens in (TOKENS, TOKENS[:, :40]):
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"rope.scaling.type": "dynamic"}, {}, "rope.scaling.type 'dynamic'"),
        ({"rope.dimension_count": 8}, {}, "rope.dimension_count 8"),
        ({"attention.scale": 0.5}, {}, r"llama\.attention\.scale is 0\.5"),
        ({"logit_scale": 0.25}, {}, "logit_scale"),
        ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
        ({"attention.sliding_window": 16}, {}, "sliding_window is 16"),
        ({"expert_count": 8}, {}, "expert_count is 8"),
        ({"attention.head_count_kv": [2, 1]}, {}, "head_count_kv differs by layer"),
        ({"attention.value_length": 32}, {}, "value_length"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, {}, "epsilon is nan"),
        ({"something_new": 1}, {}, r"llama\.something_new is 1"),
        ({}, {"blk.1.ffn_up.weight": None}, r"missing: blk\.1\.ffn_up\.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"not part of the model: blk\.0\.attn_q\.bias"),
        ({}, {"blk.0.ffn_norm.weight": np.ones(32, np.float32)}, r"ffn_norm\.weight is \[32\], not \[64\]"),
        ({}, {"blk.2.ffn_norm.weight": np.ones(64, np.float32)}, "block_count is 2"),
        ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, r"rope_freqs\.weight is not 8 positive numbers"),
        ({"feed_forward_length": 1 << 31}, {}, r"ffn_gate\.weight is \[96, 64\]"),
        ({"block_count": 1 << 31}, {}, "block_count"),
        ({"vocab_size": 1 << 31}, {}, "vocab_size"),
        ({"attention.head_count": 1 << 31}, {}, "head_count"),
    ],
)
def test_what_a_model_cannot_have_is_refused_by_name(tmp_path, metadata, tensors, words):
    """vllm 3767 and others: keys and tensors without a place in the model were dropped."""
    write_gguf(tmp_path / "m.gguf", llama(), metadata=metadata, tensors=tensors)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "m.gguf")


def test_unknown_architectures_are_refused(tmp_path, whole):
    (tmp_path / "m.gguf").write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(InputError, match="architecture 'mamba' cannot be read"):
        load(tmp_path / "m.gguf")


def header_of(folder, data):
    (folder / "m.gguf").write_bytes(data)
    return gguf_header(locate("m.gguf", folder))


def test_no_count_of_a_header_is_believed(tmp_path, whole):
    """Counts, lengths and offsets beyond the file end in an InputError, before anything is allocated for them."""
    end = min(tensor.offset for tensor in header_of(tmp_path, whole).tensors.values())
    huge = (b"\xff" * 8, struct.pack("<Q", 1 << 62), struct.pack("<Q", 1 << 33), b"\0" * 8)
    for start in [*range(200), *range(200, end, 61)]:
        for value in huge:
            with suppress(InputError):  # some change nothing that the header is checked for
                header_of(tmp_path, whole[:start] + value + whole[start + 8 :])
    for length in [*range(100), *range(100, end, 151)]:
        with pytest.raises(InputError):
            header_of(tmp_path, whole[:length])


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (entry("a", 9, struct.pack("<IQ", 9, 1) * 1000), "unknown type 9"),
        (entry("a", 9, struct.pack("<IQ", 8, 1 << 40)), "more than the file holds"),
        (entry("a", 9, struct.pack("<IQ", 4, 1 << 61)), "ends after the file"),
        (entry("a", 8, struct.pack("<Q", 1 << 63)), "ends after the file"),
        (entry("a", 8, struct.pack("<Q", 2) + b"\xff\xff"), "a is not UTF-8"),
        (entry("a", 77, b"\0" * 8), "unknown type 77"),
        (entry("general.alignment", 4, struct.pack("<I", 3)), "not a power of two"),
        (entry("a", 4, b"\0" * 4) * 2, "more than the file holds|stated twice"),
    ],
)
def test_hostile_values_are_refused(tmp_path, tail, words):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2 if tail.count(b"a\x04") > 1 else 1)
    with pytest.raises(InputError, match=words):
        header_of(tmp_path, head + tail)


def test_tensors_do_not_overlap(tmp_path, whole):
    """Many tensors on the same bytes would need many times the file's size."""
    tensors = list(header_of(tmp_path, whole).tensors.values())
    at = whole.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16 + 4
    first = next(tensor for tensor in tensors if tensor.name == "blk.0.ffn_up.weight")
    offset = first.offset - min(tensor.offset for tensor in tensors)
    with pytest.raises(InputError, match="begins within"):
        header_of(tmp_path, whole[:at] + struct.pack("<Q", offset) + whole[at + 8 :])


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abch", "▁a", "ab", "▁ab"]


@pytest.mark.parametrize(
    ("metadata", "pieces"), [({}, ["▁ab", "▁a", "c"]), ({"add_space_prefix": False}, ["ab", "▁a", "c"])]
)
def test_sentencepiece_vocabularies(tmp_path, metadata, pieces):
    """transformers ignores that a file says that no space is put before a text; ids that it leaves out are usual."""
    tokens = SENTENCEPIECE + [f"[PAD{i}]" for i in range(300 - len(SENTENCEPIECE))]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(300)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (300 - 259)],
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
    }
    write_gguf(tmp_path / "m.gguf", llama(), metadata=metadata)
    tokenizer = load_tokenizer(locate("m.gguf", tmp_path))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab ac")["input_ids"]) == ["<s>", *pieces]
    assert tokenizer.decode(tokenizer("ab aé c")["input_ids"], skip_special_tokens=True).strip() == "ab aé c"


def test_a_folder_with_digits_has_the_tokenizer_of_a_file_that_says_smollm(tmp_path):
    """transformers drops the pre-tokenizer of a folder that names GPT2Tokenizer, as SmolLM2's does."""
    write_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=259), metadata={"tokenizer.ggml.pre": "smollm"})
    file = load_tokenizer(locate("m.gguf", tmp_path))
    folder = tmp_path / "folder"
    backend = tiny_tokenizer()
    backend.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"].build()
    backend.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_shared({"file": file, "folder": load_tokenizer(locate("folder", tmp_path))})
    assert file.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12\n\n") == [
        ("1", (0, 1)),
        ("2", (1, 2)),
        ("ĊĊ", (2, 4)),
    ]
