"""LoRA adapters: merged, they compute what PEFT computes with the adapter beside the model, or they are refused."""

import json
import shutil
import warnings

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from edgemix.errors import InputError
from edgemix.export.models.adapters import add_adapter
from edgemix.export.models.loading import MemberLoader, end_ids, load_member, load_model, member_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.pipeline import export_bundle
from edgemix.progress import NO_PROGRESS
from edgemix.recipe.schema import MemberRecipe, Recipe
from edgemix.runtime.graphs.decoder import DecoderGraph

TOKENS = torch.arange(3, 43)[None]
FAMILIES = {
    "llama": ("llama", {"vocab_size": 300}),
    "tied": ("llama", {"vocab_size": 300, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"vocab_size": 300}),
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, (kind, options) in FAMILIES.items():
        tiny_model(kind, **options).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def base_model(bases, family):
    return load_model(locate(family, bases))


def write_adapter(bases, family, folder, **options):
    """Write an adapter with random weights."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(bases, family), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def merged(bases, family, folder):
    return load_member(MemberRecipe("m", family, adapter=str(folder)), bases).model


LLAMA, HEADS = ("q_proj", "down_proj"), ("embed_tokens", "lm_head")
CASES = {
    "plain": ("llama", {"target_modules": LLAMA}),
    "dora": ("llama", {"target_modules": LLAMA, "use_dora": True}),
    "rslora": ("llama", {"target_modules": LLAMA, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": LLAMA, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}}),
    "regular expression": ("llama", {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}),
    "layers": ("llama", {"target_modules": LLAMA, "layers_to_transform": [1]}),
    "exclude": ("llama", {"target_modules": LLAMA, "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "parameters": ("llama", {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 7, 299]}),
    "embedding": ("llama", {"target_modules": HEADS}),
    "modules": ("llama", {"modules_to_save": HEADS}),
    "norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "tied head": ("tied", {"target_modules": ["lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied both": ("tied", {"target_modules": HEADS}),
    "tied alike": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied module": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied head module": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied modules": ("tied", {"modules_to_save": HEADS}),
    "tied modules alike": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied tokens": ("tied", {"trainable_token_indices": [5, 7, 299]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d not stated": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "conv1d tied": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias of layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "lora bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
}


def converted(options):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_merged_adapter_is_the_adapter_beside_the_model(bases, tmp_path, case):
    """Guards peft 2018 and 2777: merged into a tied weight, an adapter of the head changed the embedding, too."""
    family, options = CASES[case]
    write_adapter(bases, family, tmp_path / "adapter", **converted(options))
    before = base_model(bases, family)
    plain = logits(before)
    expected = logits(PeftModel.from_pretrained(before, tmp_path / "adapter"))
    model = merged(bases, family, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


REFUSED = {
    "alora_invocation_tokens": ([5, 6], "alora_invocation_tokens cannot be merged: an activated LoRA"),
    "layer_replication": ([[0, 2], [1, 2]], "layer_replication cannot be merged: it repeats layers"),
    "megatron_config": ({"a": 1}, "megatron_config cannot be merged"),
    "use_qalora": (True, "use_qalora cannot be merged"),
    "init_lora_weights": ("pissa_niter_4", "'pissa_niter_4' belongs to a changed base"),
    "lora_bias": (True, "lacks 2 tensors"),
    "peft_type": ("IA3", "a IA3 adapter; edgemix merges LoRA adapters"),
    "new_in_peft_9": (1, "sets new_in_peft_9, which is not known"),
    "r": (10**9, "a rank of 1000000000; it must be a number between 1 and 300"),
    "rank_pattern": ({"q_proj": -1}, "a rank of -1"),
    "target_modules": ("(a+)+x", "the regular expression of target_modules"),
    "lora_alpha": ("many", r"Expected `float \| null`, got `str` - at `\$.lora_alpha`"),
    "alpha_pattern": ([], r"at `\$.alpha_pattern`"),
    "layers_pattern": ("[", "cannot be read"),
    "modules_to_save": (["lm_head"], r"lacks 1 tensor \(base_model.model.lm_head.weight\)"),
}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return write_adapter(bases, "llama", tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def adapter(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "adapter")


def change_config(adapter, **options):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def change_tensors(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    save_file(change(tensors), adapter / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(bases, adapter, key):
    value, words = REFUSED[key]
    change_config(adapter, **{key: value})
    with pytest.raises(InputError, match=words):
        merged(bases, "llama", adapter)


def test_keys_of_other_versions_that_are_not_set_do_not_matter(bases, adapter):
    change_config(adapter, merge_weights=False, enable_lora=None, loftq_config={}, rank_pattern=None)
    merged(bases, "llama", adapter)


@pytest.mark.filterwarnings("ignore")
def test_a_bias_without_a_place_is_refused(bases, tmp_path):
    """Guards peft 2716: only beside the model can an adapter add a bias that its layers do not have."""
    write_adapter(bases, "llama", tmp_path / "adapter", lora_bias=True)
    with pytest.raises(InputError, match=r"lora_bias cannot be merged: model\.layers\.0\..*q_proj has no bias"):
        merged(bases, "llama", tmp_path / "adapter")


def rename(old, new):
    return lambda tensors: {key.replace(old, new): each for key, each in tensors.items()}


def spoil(value):
    return lambda tensors: {
        key: torch.full_like(each, value) if "1.self_attn.q_proj.lora_B" in key else each
        for key, each in tensors.items()
    }


DAMAGES = {
    "no key fits": (
        rename("model.layers.", "language_model.model.layers."),
        r"place for 4 tensors(.|\n)*language_model",
    ),
    "some fit": (rename("model.layers.0.", "_orig_mod.model.layers.0."), r"place for 2 tensors(.|\n)*torch.compile"),
    "another model": (rename("q_proj", "query"), r"place for 4 tensors .*query"),
    "missing": (lambda tensors: dict(list(tensors.items())[:2]), r"lacks 2 tensors .*layers.1.self_attn.q_proj"),
    "empty": (lambda _: {}, "holds no tensors"),
    "shape": (
        lambda tensors: {key: each[:, :8].clone() if "lora_A" in key else each for key, each in tensors.items()},
        r"lora_A.weight is \[4, 8\] in the adapter and \[4, 64\] in the model",
    ),
    "NaN": (spoil(float("nan")), r"weights of .*layers.1.self_attn.q_proj.lora_B.weight are NaN"),
    "infinite": (spoil(float("inf")), "are infinite"),
    "integers": (lambda tensors: {key: each.to(torch.int8) for key, each in tensors.items()}, "stored as I8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_named(bases, adapter, damage):
    """Guards peft 2699: where no key fits, PEFT gives the base, and where some fit, a part of the adapter."""
    change, words = DAMAGES[damage]
    change_tensors(adapter, change)
    with pytest.raises(InputError, match=words):
        merged(bases, "llama", adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": list(HEADS)}, {"target_modules": list(HEADS)}])
def test_resized_embeddings_name_both_sizes(bases, tmp_path, options):
    """Guards peft 2290: the message stopped before the sizes."""
    model = base_model(bases, "llama")
    model.resize_token_embeddings(302)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(InputError, match=r"302(.|\n)*300(.|\n)*resize_token_embeddings\(302\)"):
        merged(bases, "llama", tmp_path / "adapter")


def test_merged_weights_beside_a_configuration_are_no_adapter(bases, adapter):
    """Guards peft 1381: the whole model was saved where the adapter should be."""
    (adapter / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no .safetensors file"):
        merged(bases, "llama", adapter)
    shutil.copy(bases / "llama" / "model.safetensors", adapter)
    with pytest.raises(
        InputError, match=r"without adapter_model.safetensors, only model.safetensors(.|\n)*as the model"
    ):
        merged(bases, "llama", adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_an_adapter_that_changes_its_base_is_not_trained_further(bases, tmp_path, options):
    """Its base is shared with other members."""
    write_adapter(bases, "llama", tmp_path / "adapter", **options)
    with pytest.raises(InputError, match="cannot be trained further"):
        add_adapter(base_model(bases, "llama"), locate("adapter", tmp_path), trainable=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "weight_format", "most"),
    [
        ("tied head", "fp32", 1e-4),
        ("tied head", "int8-dynamic", 0.1),
        ("conv1d tied", "fp32", 1e-4),
    ],
)
def test_an_untied_head_is_exported(bases, tmp_path, case, weight_format, most):
    """Guards peft 2777 up to the bundle: the head of the configuration is the embedding, the merged one is not."""
    family, options = CASES[case]
    write_adapter(bases, family, tmp_path / "adapter", **converted(options))
    members = (MemberRecipe("m", family, adapter=str(tmp_path / "adapter")),)
    recipe = Recipe(members=members, format=weight_format, folder=bases)
    entry = export_bundle(recipe, tmp_path / "bundle", force=True).members[0]
    expected = logits(merged(bases, family, tmp_path / "adapter"))[0].log_softmax(-1)
    graph = DecoderGraph.load(tmp_path / "bundle" / entry.graph, entry.config, name="m")
    found = torch.from_numpy(graph.forward([TOKENS[0].numpy()])[0]).log_softmax(-1)
    assert (found - expected).abs().mean() < most
    assert (logits(base_model(bases, family))[0].log_softmax(-1) - expected).abs().mean() > 2 * most


TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def whole_tokenizer(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def template_file(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def settings(**stated):
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(stated))


TEMPLATES = {
    "whole tokenizer": whole_tokenizer,
    "template file": template_file,
    "settings": settings(chat_template=TEMPLATE, added_tokens_decoder={"1": {"content": "</s>"}}),
    "several": settings(chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_adapters_chat_template_is_used(bases, adapter, kind):
    """Guards vllm 17855: the adapter that taught its base to chat answered in the base's form."""
    TEMPLATES[kind](adapter)
    spec = MemberRecipe("m", "llama", adapter=str(adapter))
    loader = MemberLoader(bases)
    assert loader.load(spec).tokenizer.chat_template == TEMPLATE
    assert loader.load(MemberRecipe("b", "llama")).tokenizer.chat_template is None
    assert member_tokenizer(spec, bases).chat_template == TEMPLATE


def test_an_adapters_end_tokens_are_used(bases, adapter):
    spec = MemberRecipe("m", "llama", adapter=str(adapter))
    assert end_ids(load_member(spec, bases)) == {1, 2}  # the tokenizer's, the model's
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert end_ids(load_member(spec, bases)) == {1, 5, 6}
    settings(eos_token={"content": "a"})(adapter)
    letter = tiny_tokenizer().convert_tokens_to_ids("a")
    assert end_ids(load_member(spec, bases)) == {letter, 5, 6}
    assert end_ids(load_member(MemberRecipe("b", "llama"), bases)) == {1, 2}


def larger_tokenizer(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


OTHERS = {
    "larger": (larger_tokenizer, "its tokenizer is not its base's: token '<new>' is absent"),
    "merges": (lambda folder: tiny_tokenizer((("a", "c"),)).save_pretrained(folder), "token 'ab' is id 258"),
    "added": (lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 259}'), "'<new>' is id 259 in the"),
    "decoder": (settings(added_tokens_decoder={"259": {"content": "<new>"}}), "'<new>' is id 259 in the adapter only"),
    "end": (settings(eos_token="<new>"), "end-of-text token '<new>' is no token of its base"),
    "not an object": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
    "end ids": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 300}'),
        "it must be ids between 0 and 299",
    ),
    "encoding": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapters_other_tokenizer_is_refused(bases, adapter, kind):
    spoil_folder, words = OTHERS[kind]
    spoil_folder(adapter)
    with pytest.raises(InputError, match=words):
        load_member(MemberRecipe("m", "llama", adapter=str(adapter)), bases)


@pytest.mark.filterwarnings("ignore")
def test_members_with_other_heads_or_templates(bases, tmp_path):
    """An untied head is no low-rank addition, so its member cannot share a graph; the bundle has
    one chat template, and the export says whose.
    """
    write_adapter(bases, "tied", tmp_path / "head", target_modules=["lm_head"])
    for name in ("first", "second"):
        write_adapter(bases, "tied", tmp_path / name)
    template_file(tmp_path / "second")
    members = tuple(MemberRecipe(name, "tied", adapter=str(tmp_path / name)) for name in ("first", "second", "head"))
    lines = []

    class Lines(type(NO_PROGRESS)):
        def log(self, line):
            lines.append(line)

    recipe = Recipe(members=members, format="fp32", folder=bases, stack=True)
    manifest = export_bundle(recipe, tmp_path / "bundle", progress=Lines())
    assert len({entry.graph for entry in manifest.members}) == 3
    assert any("cannot share one: the members' graphs differ" in line for line in lines)
    assert any(line.startswith("second: other chat templates than first's") for line in lines)
