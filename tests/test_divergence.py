"""Divergences, against scipy and against plain definitions in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from mdu_trainer.divergence import anchor_kl, cross_entropy, entropy


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_anchor_kl_equals_its_definition(logits, tau, dtype):
    prediction, anchor = (x.to(dtype) for x in logits)
    expected = scipy_entropy(
        softmax(prediction.double().numpy(), axis=1), softmax(tau * anchor.double().numpy(), axis=1), axis=1
    )
    kl = anchor_kl(prediction, anchor, tau)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_tau_zero_is_the_uniform_anchor_and_reads_no_anchor(logits):
    expected = math.log(11) - entropy(logits[0])
    torch.testing.assert_close(anchor_kl(logits[0], None, 0.0), expected)
    with pytest.raises(ValueError, match="needs the anchor's logits"):
        anchor_kl(logits[0], None, 0.5)


def test_anchor_kl_at_its_minimum_and_its_gradient(logits):
    prediction = (0.5 * logits[1]).requires_grad_()
    kl = anchor_kl(prediction, logits[1], 0.5)
    kl.sum().backward()
    assert kl.abs().max() < 1e-12 and prediction.grad.abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: anchor_kl(x, logits[1], 0.75), logits[0].clone().requires_grad_())


def test_no_rows():
    empty = torch.zeros(0, 5)
    assert anchor_kl(empty, empty, 1.0).shape == entropy(empty).shape == (0,)


def test_entropy_and_cross_entropy(logits):
    p = softmax(logits[0].numpy(), axis=1)
    targets = torch.arange(6)
    np.testing.assert_allclose(entropy(logits[0]).numpy(), scipy_entropy(p, axis=1))
    np.testing.assert_allclose(cross_entropy(logits[0], targets).numpy(), -np.log(p[np.arange(6), targets]))
