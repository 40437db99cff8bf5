"""Losses: closed forms, what is zero at equality, what top-k keeps, and gradients against autograd's."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch

from edgemix.export.training.losses import divergence, divergence_from_top_k, top_k
from edgemix.recipe.compression import Divergence

KINDS = get_args(Divergence)
ROWS, VOCABULARY = 12, 40


def logits(seed, scale=3.0):
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def test_closed_forms():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(p, q, "forward").item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(p, q, "reverse").item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert divergence(p, q, "total-variation").item() == pytest.approx(0.25)
    ensemble = [0.8 * 0.25 + 0.2 * 0.5, 0.8 * 0.75 + 0.2 * 0.5]
    expected = sum(0.5 * math.log(0.5 / each) for each in ensemble)
    assert divergence(p, q, "skewed", skew=0.2).item() == pytest.approx(expected)
    # At temperature 2, probabilities go as their square roots.
    root = 0.25**0.5 / (0.25**0.5 + 0.75**0.5)
    assert divergence(p, q, "total-variation", temperature=2).item() == pytest.approx(0.5 - root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_zero_at_equality_and_only_there(kind, temperature):
    one, other = logits(1), logits(2)
    same = (one + 5).requires_grad_()  # logits are defined up to a constant
    loss = divergence(one, same, kind, temperature)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    smooth = kind != "total-variation"  # which has a kink there
    assert not smooth or torch.autograd.grad(loss, same)[0].abs().max() < 1e-6
    assert divergence(one, other, kind, temperature) > 0.05

    teacher = top_k(one, 5, temperature)
    loss = divergence_from_top_k(teacher, same, kind, temperature)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert not smooth or torch.autograd.grad(loss, same)[0].abs().max() < 1e-6
    assert divergence_from_top_k(teacher, other, kind, temperature) > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_a_lower_bound_that_increases_with_k(kind, temperature):
    one, other = logits(1), logits(2)
    whole = divergence(one, other, kind, temperature).item()
    kept = [divergence_from_top_k(top_k(one, k, temperature), other, kind, temperature).item() for k in range(1, 41)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(kept))
    assert kept[0] < 0.9 * whole
    assert kept[-1] == pytest.approx(whole, rel=1e-5)


def test_total_variation_is_off_by_at_most_the_tail():
    one, other = logits(1), logits(2)
    teacher = top_k(one, 8)
    missed = divergence(one, other, "total-variation") - divergence_from_top_k(teacher, other, "total-variation")
    assert 0 <= missed <= teacher.tail.exp().mean()


def test_the_tail_is_exact_where_it_is_tiny():
    """In fp32, one minus the others' sum would be zero or negative, and its logarithm NaN."""
    sharp = torch.full((1, VOCABULARY), -40.0)
    sharp[0, 3] = 0
    teacher = top_k(sharp, 1)
    assert teacher.tail.item() == pytest.approx(-40 + math.log(VOCABULARY - 1))
    for kind in KINDS:
        student = logits(4)[:1].requires_grad_()
        loss = divergence_from_top_k(teacher, student, kind)
        assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
        assert torch.isfinite(divergence_from_top_k(top_k(logits(4)[:1], 1), sharp, kind))


def test_probabilities_of_the_top_and_the_tail_sum_to_one():
    for k, temperature in ((1, 1.0), (7, 0.3), (39, 4.0), (40, 1.0), (100, 1.0)):
        teacher = top_k(logits(3), k, temperature)
        assert teacher.events.exp().sum(1) == pytest.approx(torch.ones(ROWS), abs=1e-5)
        expected = (logits(3) / temperature).log_softmax(-1).gather(1, teacher.ids)
        torch.testing.assert_close(teacher.log_probabilities, expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_zero_teacher_probability():
    one, other = logits(1), logits(2)
    one[:, ::2] = -math.inf
    for kind in KINDS:
        assert torch.isfinite(divergence(one, other, kind))
        assert torch.isfinite(divergence_from_top_k(top_k(one, 30), other, kind))
    allowed = one[:, 1::2], other[:, 1::2]
    kept = other.log_softmax(-1)[:, 1::2].exp().sum(-1)
    forward = divergence(*allowed, "forward") - kept.log().mean()
    assert divergence(one, other, "forward").item() == pytest.approx(forward.item(), rel=1e-5)
