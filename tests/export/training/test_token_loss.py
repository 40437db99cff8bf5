from contextlib import suppress

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch.nn import functional

from edgemix.export.training.lora import FreshAdapter, attach_adapters, frozen_in_bfloat16
from edgemix.export.training.token_loss import token_loss, token_losses


def expected_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi3", "gemma2", "opt"])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_loss_and_gradient_match_torch(name, frozen_head):
    """gemma2 caps its logits, so its head is more than a linear layer; a trainable head needs a gradient, too."""
    model = tiny_model(name).requires_grad_(not frozen_head)
    trained = next(each for each in model.parameters() if each.ndim == 1).requires_grad_()
    ids = torch.randint(0, 160, (3, 60), generator=torch.Generator().manual_seed(0))
    loss = token_loss(model)(ids)
    (gradient,) = torch.autograd.grad(loss, trained)
    (wanted,) = torch.autograd.grad(expected_loss(model, ids), trained)
    torch.testing.assert_close(loss, expected_loss(model, ids))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close():
    model = tiny_model("llama").requires_grad_(requires_grad=False)
    ids = torch.randint(0, 160, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert token_loss(model, bfloat16=True)(ids).item() == pytest.approx(expected_loss(model, ids).item(), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "opt"])
def test_frozen_weights_in_bfloat16_change_no_number(name):
    model = tiny_model(name).requires_grad_(requires_grad=False)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    ids = torch.randint(0, 160, (2, 50), generator=torch.Generator().manual_seed(0))
    with attach_adapters(model, [FreshAdapter(rank=2, alpha=4, seed=0)]) as adapters:
        loss, trained = token_loss(model, bfloat16=True), list(adapters.parameters(0).values())
        wanted = loss(ids), *torch.autograd.grad(loss(ids), trained)
        with suppress(KeyboardInterrupt), frozen_in_bfloat16(model, enabled=True):
            found = loss(ids), *torch.autograd.grad(loss(ids), trained)
            assert torch.bfloat16 in {each.dtype for each in model.parameters()}
            raise KeyboardInterrupt
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_each_token_has_its_own_loss_and_weight(name):
    """With a linear head, and from the whole model's logits."""
    model = tiny_model(name).requires_grad_(requires_grad=False)
    trained = next(each for each in model.parameters() if each.ndim == 1).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    ids, factors = torch.randint(0, 150, (3, 60), generator=generator), torch.rand(3 * 59, generator=generator)
    losses = token_losses(model, vocabulary=150)(ids)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :150]
    wanted_losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses, wanted_losses)
    (gradient,) = torch.autograd.grad((losses * factors).sum(), trained)
    (wanted,) = torch.autograd.grad((wanted_losses * factors).sum(), trained)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
