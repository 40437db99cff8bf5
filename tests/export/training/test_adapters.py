import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.errors import InputError
from edgemix.export.finetuning.mixture_likelihood import MixtureLikelihood
from edgemix.export.training.lora import FreshAdapter, attach_adapters
from edgemix.export.training.token_loss import token_losses

IDS = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))
FRESH = [FreshAdapter(4, 8, seed) for seed in range(3)]


def gradients(name, *, recompute):
    """Return three adapters' gradients by their mixture's likelihood, and how often the model's layers ran."""
    model = tiny_model(name)
    layers = [module for module in model.modules() if module.__class__.__name__.endswith(("DecoderLayer", "Block"))]
    runs = []
    with attach_adapters(model, FRESH, recompute=recompute) as adapters:
        for index in range(3):
            for parameter in adapters.parameters(index).values():
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))

        def reader(index):
            losses = token_losses(model)

            def read(ids):
                adapters.activate(index)
                return losses(ids)

            return read

        readers = [reader(index) for index in range(3)]
        model.train()
        for layer in layers:
            layer.register_forward_hook(lambda *_: runs.append("forward"))
            layer.input_layernorm.register_forward_hook(lambda *_: runs.append("inside"))
        loss = MixtureLikelihood(readers, torch.tensor([0.2, 0.3, 0.5]))(IDS)
        loss.backward()
        found = [[each.grad for each in adapters.parameters(index).values()] for index in range(3)]
    return found, runs.count("inside") / runs.count("forward")


def test_recomputed_layers_use_the_adapter_of_their_forward_pass():
    """When a layer is recomputed, another member's forward pass has happened since."""
    kept, once = gradients("llama", recompute=False)
    again, twice = gradients("llama", recompute=True)
    assert (once, twice) == (1, 2)
    for ours, theirs in zip(again, kept, strict=True):
        assert max(each.abs().max() for each in ours) > 1e-3
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_model_is_restored(recompute):
    model = tiny_model("llama").train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with attach_adapters(model, FRESH, recompute=recompute) as adapters:
        assert len({name for index in range(3) for name in adapters.parameters(index)}) == 3 * 28
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert not any(each.requires_grad for each in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match="no linear layer"), attach_adapters(model, FRESH):
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_rank_above_every_layers_is_refused(name):
    """A rank of 100,000 took all memory, and the system killed the process."""
    with (
        pytest.raises(InputError, match="the rank 65 is more than that of any layer of this model, 64"),
        attach_adapters(tiny_model(name), [FreshAdapter(64, 8, 0), FreshAdapter(65, 8, 0)]),
    ):
        pass
