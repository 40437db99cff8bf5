"""The loss by rows: the same loss and the same gradients as autograd's on whole logits."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers.tiny_models import tiny_model

from edgemix.export.distillation import head_loss
from edgemix.export.distillation.head_loss import objective_loss
from edgemix.export.training.losses import Objective, divergence_from_top_k, top_k
from edgemix.recipe.compression import Divergence

BATCH, LENGTH, VOCABULARY = 3, 9, 150


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows and columns that do not divide what there is."""
    monkeypatch.setattr(head_loss, "ROWS", 7)
    monkeypatch.setattr(head_loss, "CACHED_ROWS", 3)
    monkeypatch.setattr(head_loss, "COLUMNS", 64)


def batch(k, temperature):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    logits = torch.randn(BATCH * (LENGTH - 1), VOCABULARY, generator=generator) * 2
    return ids, top_k(logits, k, temperature)


def expected_loss(model, ids, teacher, objective):
    logits = model(input_ids=ids).logits[:, :-1, :VOCABULARY].flatten(0, 1)
    own = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    apart = divergence_from_top_k(teacher, logits, objective.kind, objective.temperature, objective.skew)
    return (1 - objective.alpha) * own + objective.alpha * objective.temperature**2 * apart


def compare(model, objective, k, rtol=1e-4):
    ids, teacher = batch(k, objective.temperature)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = expected_loss(model, ids, teacher, objective)
    expected = torch.autograd.grad(3 * wanted, parameters)
    loss = objective_loss(model, objective, VOCABULARY)(ids, teacher)
    got = torch.autograd.grad(3 * loss, parameters)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, one, other in zip(names, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert max(each.abs().max() for each in got) > 1e-3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.6, 1.0), (0.6, 2.5), (1.0, 0.5)])
def test_gradients_are_autograds(kind, alpha, temperature):
    compare(tiny_model("llama-tied"), Objective(kind, alpha, temperature, skew=0.2), k=6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("k", [1, VOCABULARY])
def test_any_k(k):
    compare(tiny_model("llama"), Objective("forward", 0.5), k)


@pytest.mark.usefixtures("small_chunks")
def test_a_bias_and_a_head_that_is_not_linear_alone():
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(160))
    compare(model, Objective("skewed", 0.7), k=6)
    compare(tiny_model("gemma2"), Objective("forward", 0.7), k=6)  # it caps its logits


def test_a_frozen_head_stays():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(requires_grad=False)
    ids, teacher = batch(6, 1.0)
    objective_loss(model, Objective(), VOCABULARY)(ids, teacher).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed"])
def test_at_equality_nothing_is_left_to_learn(kind):
    model = tiny_model("llama-tied")
    ids, _ = batch(6, 1.0)
    with torch.no_grad():
        teacher = top_k(model(input_ids=ids).logits[:, :-1, :VOCABULARY].flatten(0, 1), 6)
    loss = objective_loss(model, Objective(kind), VOCABULARY)(ids, teacher)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert max(each.grad.abs().max() for each in model.parameters()) < 1e-5


def test_bfloat16_is_near():
    model = tiny_model("llama-tied")
    objective = Objective("forward", 0.9)
    ids, teacher = batch(6, 1.0)
    wanted = expected_loss(model, ids, teacher, objective)
    expected = torch.autograd.grad(wanted, model.lm_head.weight)[0]
    loss = objective_loss(model, objective, VOCABULARY, bfloat16=True)(ids, teacher)
    got = torch.autograd.grad(loss, model.lm_head.weight)[0]
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99


def test_buffers_are_used_again():
    model = tiny_model("llama")
    loss = objective_loss(model, Objective(), VOCABULARY)
    ids, teacher = batch(6, 1.0)
    first = loss(ids, teacher)
    loss(ids.flip(1), teacher)
    assert loss(ids, teacher).item() == first.item()
