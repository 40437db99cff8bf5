import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers.finetuning_setting import OPTIONS, TEXT, eos_tokenizer
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.finetuning.finetune import finetune, finetune_model
from edgemix.export.finetuning.joint import finetune_mixture
from edgemix.export.models.adapters import merge_adapter
from edgemix.export.models.loading import load_model
from edgemix.export.models.location import locate
from edgemix.export.training import qlora
from edgemix.export.training.qlora import load_base, quantize_linears, split_linears, survives_nf4
from edgemix.progress import NO_PROGRESS
from edgemix.recipe.schema import MemberRecipe, Recipe


@pytest.fixture
def tokenizer():
    return eos_tokenizer()


OPTIONS_OF_A_FILE = {name: value for name, value in OPTIONS.items() if name != "base_name"}
SHAPE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture
def base(tokenizer, tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama", **SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def listener():
    said = []
    heard = type(NO_PROGRESS)()
    heard.log = said.append
    return heard, said


def size(model):
    """Return the bytes of all weights, including the scales of 4-bit weights."""
    scales = [
        module.weight.quant_state.absmax.nbytes + module.weight.quant_state.state2.absmax.nbytes
        for module in model.modules()
        if isinstance(module, Linear4bit)
    ]
    return sum(each.nbytes for each in model.parameters()) + sum(scales)


def test_the_4_bit_base_takes_a_quarter_of_the_memory(base):
    location = locate("base", base.parent)
    full, small = load_model(location), load_base(location, four_bit=True)
    assert size(full) / size(small) > 4
    assert not isinstance(small.lm_head, Linear4bit)
    assert sum(isinstance(module, Linear4bit) for module in small.modules()) == 14
    for name, layer in small.named_modules():
        if isinstance(layer, Linear4bit):
            weight = full.get_submodule(name).weight
            error = dequantize_4bit(layer.weight.data, layer.weight.quant_state) - weight
            assert 0.05 < error.std() / weight.std() < 0.12, name


def test_quantizing_while_loading_or_in_memory_gives_the_same_weights(base):
    """A GGUF file is loaded completely, then quantized."""
    location = locate("base", base.parent)
    read, made = load_base(location, four_bit=True), quantize_linears(load_model(location))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, made(ids).logits)


def test_an_adapter_on_4_bits_learns_and_fits_the_whole_model(base, tmp_path):
    report = finetune(str(base), tmp_path / "expert", TEXT, four_bit=True, **OPTIONS_OF_A_FILE)
    assert report.validation_after < report.validation_before - 0.5
    config = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    full = finetune(str(base), tmp_path / "full", TEXT, **OPTIONS_OF_A_FILE)
    assert report.validation_after == pytest.approx(full.validation_after, abs=0.3)
    plain = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert config == plain
    merged = merge_adapter(load_model(locate("base", tmp_path)), locate("expert", tmp_path))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (merged(ids).logits - load_model(locate("base", tmp_path))(ids).logits).abs().max() > 0.1


def test_gradients_reach_the_first_layer_after_a_forward_pass_without_gradients(base, tmp_path):
    """bitsandbytes repacks weights in a forward pass without gradients, and later gradients through them are lost."""
    model = load_base(locate("base", tmp_path), four_bit=True)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = model(ids).logits
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    after = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(after.logsumexp(-1).sum(), embedded)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(before, after)


def test_members_in_4_bits_learn_jointly(base, tmp_path):
    recipe = Recipe(members=(MemberRecipe("a", "base"), MemberRecipe("b", "base")), folder=tmp_path)
    report = finetune_mixture(recipe, tmp_path / "out", {"animals": TEXT}, four_bit=True, **OPTIONS_OF_A_FILE)
    assert report.validation_after < report.validation_before - 0.5


def test_gpt2s_convolutions_are_kept_in_4_bits(tokenizer, tmp_path):
    model = quantize_linears(tiny_model("gpt2"))
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 8
    full, ids = tiny_model("gpt2"), torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (model(ids).logits - full(ids).logits).abs().mean() < 0.3 * full(ids).logits.std()
    report = finetune_model(model, tokenizer, tmp_path / "expert", TEXT, **OPTIONS)
    assert report.validation_after < report.validation_before - 0.2
    merge_adapter(full, locate("expert", tmp_path))


@pytest.mark.parametrize(
    ("shape", "fits"), [((64, 128), True), ((100, 64), True), ((64, 96), False), ((64, 32), False)]
)
def test_only_rows_of_whole_blocks_are_supported(shape, fits):
    assert survives_nf4(*shape) is fits


def test_unsupported_layers_stay_in_fp32(tokenizer, tmp_path):
    """intermediate_size is 96: a row of down_proj ends within a block, which bitsandbytes dequantizes wrongly."""
    model = tiny_model("llama")
    assert {name.rpartition(".")[2] for name in split_linears(model).unsupported} == {"down_proj"}
    model.save_pretrained(tmp_path / "base")
    progress, said = listener()
    small = load_base(locate("base", tmp_path), four_bit=True, progress=progress)
    assert said == ["base: 2 linear layers stay in fp32: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"]
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_wrong_dequantization_is_detected(base, monkeypatch):
    """Dequantized weights are compared with the original ones, whatever the shapes are."""
    import bitsandbytes.functional

    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *args: right(*args).roll(1, 0))
    survives_nf4.cache_clear()
    with pytest.raises(InputError, match="can keep none of its linear layers"):
        load_base(locate("base", base.parent), four_bit=True)
    survives_nf4.cache_clear()


def test_low_memory_is_reported(base, monkeypatch):
    progress, said = listener()
    load_base(locate("base", base.parent), four_bit=False, progress=progress)
    assert not said
    monkeypatch.setattr(qlora.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    load_base(locate("base", base.parent), four_bit=False, progress=progress)
    assert "are free; --qlora keeps it in 4 bits" in said[0]
