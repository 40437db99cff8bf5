import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model
from torch.nn import functional

from edgemix.export.finetuning.mixture_likelihood import MixtureLikelihood
from edgemix.export.stages.weights import fit
from edgemix.export.training.token_loss import token_losses

IDS = torch.randint(3, 160, (3, 20), generator=torch.Generator().manual_seed(0))
WEIGHTS = (0.5, 0.2, 0.3)


@pytest.fixture
def models():
    """Three different members, each with one trainable vector: its last norm."""
    found = []
    for seed in range(3):
        model = tiny_model("llama").requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(seed)
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=generator) * 0.3)
        model.model.norm.weight.requires_grad_()
        found.append(model)
    return found


def likelihood(models, weights=WEIGHTS):
    return MixtureLikelihood([token_losses(model) for model in models], torch.tensor(weights))


def mixed(models):
    """Compute -log sum_i w_i p_i(y) from whole distributions."""
    members = torch.stack(
        [functional.softmax(model(IDS, use_cache=False).logits[:, :-1].double(), -1) for model in models]
    )
    mixture = (torch.tensor(WEIGHTS).double()[:, None, None, None] * members).sum(0)
    return -mixture.gather(-1, IDS[:, 1:, None]).log().mean()


def test_loss_and_gradients_match_autograd(models):
    trained = [model.model.norm.weight for model in models]
    loss, expected = likelihood(models)(IDS), mixed(models)
    torch.testing.assert_close(loss.double(), expected)
    gradients, wanted = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-7)


def test_a_members_gradient_is_weighted_by_responsibilities(models):
    """Generalized EM: the gradient through the mixture's logarithm is that of the expected complete likelihood."""
    mixture = likelihood(models)
    with torch.no_grad():
        joint = torch.tensor(WEIGHTS)[:, None] * mixture.log_probabilities(IDS).exp()
    responsibilities = joint / joint.sum(0)
    for index, model in enumerate(models):
        weight = model.model.norm.weight
        own = (responsibilities[index] * token_losses(model)(IDS)).mean()
        (wanted,) = torch.autograd.grad(own, weight)
        (gradient,) = torch.autograd.grad(mixture(IDS), weight)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


def test_one_member_is_its_own_mixture(models):
    loss = token_losses(models[0])(IDS).mean()
    assert torch.equal(likelihood(models[:1], (1.0,))(IDS), loss)


def test_equal_members_have_equal_responsibilities(models):
    mixture = likelihood([models[1]] * 3)
    assert mixture(IDS).item() == pytest.approx(token_losses(models[1])(IDS).mean().item(), rel=1e-5)
    mixture.update_weights(1)
    assert mixture.weights.tolist() == pytest.approx(WEIGHTS, rel=1e-5)


def test_the_weights_step_to_the_mean_responsibilities(models):
    mixture = likelihood(models)
    joint = mixture.weights[:, None] * mixture.log_probabilities(IDS).detach().exp()
    mean = (joint / joint.sum(0)).mean(1)
    expected = torch.lerp(torch.tensor(WEIGHTS), mean, 4**-0.6)
    with torch.no_grad():  # in two parts, as when a step's windows are read some at a time
        mixture(IDS[:1])
        mixture(IDS[1:])
    mixture.update_weights(3)
    torch.testing.assert_close(mixture.weights, expected)


def test_weights_converge_to_the_fitted_ones(models):
    mixture = likelihood(models, (1 / 3, 1 / 3, 1 / 3))
    with torch.no_grad():
        for step in range(1, 600):
            mixture(IDS)
            mixture.update_weights(step)
        wanted = fit(mixture.log_probabilities(IDS).double().numpy())
    np.testing.assert_allclose(mixture.weights.numpy(), wanted.weights, atol=2e-3)
    assert max(wanted.weights) < 1
    assert -mixture(IDS).item() == pytest.approx(wanted.log_likelihoods[-1], abs=1e-4)
    assert math.isclose(mixture.weights.sum().item(), 1, rel_tol=1e-6)
