"""A loaded model is its files: whatever transformers would fill in, leave aside or load instead is refused by name."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from edgemix.errors import InputError
from edgemix.export.graphs.decoder import export_graph
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.loading import load_member, load_model
from edgemix.export.models.location import locate
from edgemix.export.pipeline import export_bundle
from edgemix.recipe.schema import MemberRecipe, Recipe

DOWN = "model.layers.1.mlp.down_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model as the folder "m", and return it."""

    def save(name="llama", **options):
        tiny_model(name, **options).save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    return save


def rewrite(folder, change):
    """Replace a folder's tensors by what `change` makes of them."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / "model.safetensors")


def configure(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def load(folder):
    return load_model(locate(folder.name, folder.parent))


def without(key):
    return lambda weights: {other: weight for other, weight in weights.items() if other != key}


def renamed(change):
    return lambda weights: {change(key): weight for key, weight in weights.items()}


def spoiled(key, value):
    def change(weights):
        weights[key].view(-1)[3] = value
        return weights

    return change


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("llama", without(DOWN), rf"it lacks 1 tensor \({DOWN}\)"),
        ("llama", without("lm_head.weight"), r"it lacks 1 tensor \(lm_head.weight\)"),
        ("llama", renamed("_orig_mod.{}".format), r"no place for 21 tensors \(_orig_mod.lm_head(.|\n)*torch.compile"),
        ("llama", renamed("module.{}".format), r"no place for 21 tensors(.|\n)*data parallelism"),
        ("llama", renamed(lambda key: key.replace("s.1.", "s.1._orig_mod.")), r"lacks 9 tensors(.|\n)*torch.compile"),
        ("llama", lambda w: {**w, DOWN: w[DOWN][:, 1:]}, rf"{DOWN}\): \[64, 95\] in the file, \[64, 96\] in the model"),
        ("llama", lambda w: {**w, "v_head.bias": torch.ones(1)}, r"no place for 1 tensor \(v_head.bias\)"),
        ("llama", spoiled(DOWN, float("nan")), rf"1 of 6,144 weights of {DOWN} are NaN"),
        ("llama", spoiled("model.norm.weight", float("inf")), "1 of 64 weights of model.norm.weight are infinite"),
        ("llama", lambda w: {**w, DOWN: w[DOWN].to(torch.float8_e4m3fn)}, f"{DOWN} are stored as F8_E4M3"),
        ("mixtral", without(EXPERT), "that make up model.layers.0.mlp.experts.gate_up_proj are missing"),
        ("mixtral", spoiled(EXPERT, float("nan")), f"1 of 6,144 weights of {EXPERT} are NaN"),
        ("llama", lambda w: {**w, "x.attention.bias": torch.ones(64)}, r"no place for 1 tensor \(x.attention.bias\)"),
    ],
)
def test_other_tensors_than_the_model_has_are_refused(saved, model, change, words):
    """transformers 43429, vllm 53020, peft 3611: random numbers, or NaN, in place of weights, and a warning at most."""
    folder = saved(model)
    rewrite(folder, change)
    with pytest.raises(InputError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("llama-tied", {"attention_bias": False}, r"no place for 8 tensors \(model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"attention_bias": True}, r"it lacks 8 tensors \(model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"num_hidden_layers": 1}, r"no place for 9 tensors \(model.layers.1."),
        ("llama", {"num_hidden_layers": 3}, r"it lacks 9 tensors \(model.layers.2."),
        ("llama", {"vocab_size": 170}, r"2 tensors \(lm_head.weight, .*: \[160, 64\] in the file, \[170, 64\]"),
        ("mixtral", {"num_local_experts": 4}, r"\[8, 64, 96\] in the file, \[4, 64, 96\] in the model"),
        ("llama", {"transformers_weights": "other.safetensors"}, "config.json names other weights"),
    ],
)
def test_configurations_of_another_model_are_refused(saved, model, settings, words):
    """vllm 3767: biases that the configuration does not mention were left aside."""
    folder = saved(model)
    configure(folder, **settings)
    with pytest.raises(InputError, match=words):
        load(folder)


MASKS = {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.0.attn.masked_bias": torch.tensor(-1e4)}
FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("llama", lambda weights: weights | FREQUENCIES),
        ("llama", renamed(lambda key: key.removeprefix("model."))),
        ("llama", lambda weights: {key: weight.bfloat16().float() for key, weight in weights.items()}),
        ("llama-tied", lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
        ("gpt2", lambda weights: {key.removeprefix("transformer."): w for key, w in weights.items()} | MASKS),
        ("mixtral", lambda weights: weights),
        ("apertus", lambda weights: weights),
        ("gpt_oss", lambda weights: weights),
        ("xglm", lambda weights: weights),
    ],
)
@pytest.mark.filterwarnings("ignore:m. transformers warns")
def test_harmless_differences_are_loaded(saved, model, change):
    folder = saved(model)
    rewrite(folder, change)
    load(folder)


def test_a_head_that_differs_from_the_embedding_is_kept(saved):
    """The configuration said that they are tied: what reads it made both the same again."""
    folder = saved()
    configure(folder, tie_word_embeddings=True)
    model = load(folder)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert not model.config.tie_word_embeddings


def sharded(folder):
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())


def lost_shard(folder):
    sharded(folder)
    (folder / "model-00002-of-00004.safetensors").unlink()


def two_sets(folder):
    whole = (folder / "model.safetensors").read_bytes()
    sharded(folder)
    (folder / "model.safetensors").write_bytes(whole)


def index_with(**entries):
    def change(folder):
        index = sharded(folder)
        index["weight_map"] |= entries
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def twice(folder):
    sharded(folder)
    shutil.copy(folder / "model-00002-of-00004.safetensors", folder / "copy.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "copy.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lost_shard, "1 of 4 files of the weights are missing: model-00002-of-00004.safetensors"),
        (two_sets, "two sets of weights"),
        (twice, "two files hold the tensor"),
        (index_with(ghost="model-00002-of-00004.safetensors"), r"names 1 tensor \(ghost\) that no file holds"),
        (index_with(ghost="../other.safetensors"), "no .safetensors file of the folder"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "cannot be read"),
        (lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"), "there is neither"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "lies beside the model's own weights"),
    ],
)
def test_folders_that_hold_no_single_model_are_refused(saved, change, words):
    """peft 1381: an adapter beside merged weights was put on top of them."""
    folder = saved()
    change(folder)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_a_model_in_several_files_is_loaded(saved):
    folder = saved()
    sharded(folder)
    assert torch.equal(load(folder).lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq, 4 bits\)"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, r"\(awq, 4 bits\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\)"),
        ({"quantization_config": {"load_in_8bit": True}}, r"\(bitsandbytes, 8 bits\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"\(compressed-tensors\)"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, r"\(hqq\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"\(MLX, 4 bits\)"),
    ],
)
def test_quantized_checkpoints_are_refused_before_weights_are_read(tmp_path, settings, words):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "llama"} | settings))
    (tmp_path / "m/model.safetensors").write_bytes(b"never read")
    with pytest.raises(InputError, match=words):
        load_member(MemberRecipe("m", "m"), tmp_path)


def test_no_graph_is_made_of_weights_that_are_not_finite(tmp_path):
    """peft 3611: each path was tried, and "no exporter" was said to be able to make a graph of the model type."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"1 of 10,240 weights of lm_head\.weight are NaN"):
        export_graph(model, tmp_path / "graph", target="cpu")


class Log:
    """A progress callback that keeps the lines."""

    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


@pytest.fixture
def warned(saved):
    """A model's folder with two files of weights, and rotary settings that transformers warns about."""
    folder = saved()
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 128}
    configure(folder, rope_parameters=rope)
    return folder


def test_warnings_of_libraries_are_shown_once(warned):
    log = Log()
    with library_warnings(log):
        load(warned)
        load(warned)
    assert len(log.lines) == 2
    assert any("m: consolidated.safetensors: not read" in line for line in log.lines)
    assert any("m: transformers warns: The explicitly set RoPE scaling factor" in line for line in log.lines)


def test_strict_makes_warnings_errors_each_time(warned):
    for _ in range(2):
        with library_warnings(strict=True), pytest.raises(InputError, match="RoPE scaling factor"):
            load(warned)


def test_a_strict_export_stops_at_a_warning(tmp_path):
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    shutil.copy(tmp_path / "m/model.safetensors", tmp_path / "m/consolidated.safetensors")
    recipe = Recipe(members=(MemberRecipe("m", "m"),), folder=tmp_path)
    with pytest.raises(InputError, match=r"consolidated.safetensors: not read(.|\n)*--strict"):
        export_bundle(recipe, tmp_path / "bundle", strict=True)
    assert not (tmp_path / "bundle").exists()
