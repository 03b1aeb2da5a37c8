"""Divergences, against scipy and against plain definitions in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdu_trainer import divergence
from mdu_trainer.divergence import AnchorKL, Joint, Projection, TokenNLL, anchor_kl


def entropy(logits):
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


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


@pytest.mark.parametrize("tau", [0.0, 0.7])
@pytest.mark.parametrize("from_logits", [True, False])
def test_jensen_shannon_equals_its_definition(logits, tau, from_logits):
    """Against scipy's square root of it, in nats; the gradient against finite differences."""
    prediction, anchor = logits
    p, q = (softmax(x.numpy(), axis=1) for x in (prediction, tau * anchor))
    measure = AnchorKL(tau, anchor if tau else None, direction="js")

    def values(z):
        return measure(z if from_logits else Projection(z, torch.eye(11, dtype=torch.float64))).value

    np.testing.assert_allclose(values(prediction).numpy(), jensenshannon(p, q, axis=1) ** 2, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: (values(z) * torch.arange(1, 7)).sum(), prediction.requires_grad_())
    far = torch.tensor([[60.0, -60.0]]), torch.tensor([[-60.0, 60.0]])
    assert AnchorKL(1.0, far[1], direction="js")(far[0]).value.item() == pytest.approx(math.log(2)), "its bound"


def test_no_rows():
    empty = torch.zeros(0, 5)
    assert anchor_kl(empty, empty, 1.0).shape == (0,) == TokenNLL(empty[:, 0].long())(empty).entropy.shape


def test_entropy_and_cross_entropy(logits):
    p = softmax(logits[0].numpy(), axis=1)
    targets = torch.arange(6)
    nll, token_entropy = TokenNLL(targets)(logits[0])
    np.testing.assert_allclose(token_entropy.numpy(), scipy_entropy(p, axis=1))
    np.testing.assert_allclose(nll.numpy(), -np.log(p[np.arange(6), targets]))


# Fused with the head: the same figures and gradients as float64 finds from all logits at once.

TAUS = [0.0, 0.25, 1.0, 3.0]
CASES = {
    "rows": st.sampled_from([0, 1, 2, 7, 40]),
    "width": st.integers(1, 24),
    "vocabulary": st.integers(2, 90),
    "tau": st.sampled_from([*TAUS, None]),
    "bias": st.booleans(),
    "trained": st.booleans(),
    "anchor": st.sampled_from(["own head", "same head", "logits"]),
    "shares": st.sampled_from(["known", "wrong", "none"]),
    "chunk": st.sampled_from([1, 3 * 90, 1 << 20]),
    "block": st.sampled_from([1, 2 * 90, 1 << 20]),
    "seed": st.integers(0, 1000),
}


def make_case(rows, width, vocabulary, tau, bias, anchor, seed, dtype, **_):
    """Inputs of a fused measure, the plain definition on float64 copies of them, and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def head():
        return normal(vocabulary, width) / width**0.5, normal(vocabulary) if bias else None

    hidden, (weight, bias_) = normal(rows, width), head()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    anchor_hidden = normal(rows, width)
    anchor_weight, anchor_bias = head() if anchor == "own head" else (weight, bias_)
    projection = Projection(anchor_hidden, *((anchor_weight, anchor_bias) if anchor == "own head" else ()))
    anchor_logits = anchor_hidden.double() @ anchor_weight.double().T
    if anchor_bias is not None:
        anchor_logits = anchor_logits + anchor_bias.double()

    def definition(logits):
        log_p = logits.log_softmax(-1)
        if tau is None:
            return -log_p.gather(1, targets[:, None])[:, 0]
        return (log_p.exp() * (log_p - (tau * anchor_logits).log_softmax(-1))).sum(-1)

    def measure(token_weight, from_logits=False):
        if tau is None:
            return TokenNLL(targets, token_weight)
        return AnchorKL(tau, anchor_logits if from_logits or anchor == "logits" else projection, token_weight)

    return hidden, weight, bias_, measure, definition, torch.rand(rows, generator=generator)


def relative(a, b):
    """Relative error; of figures under 0.01 nats, which are differences of larger ones, in units of 0.01."""
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-2)).item()


def check_fused(case, dtype, tolerance, trained, shares, chunk, block):
    hidden, weight, bias, measure, definition, upstream = make_case(dtype=dtype, **case)
    hidden.requires_grad_()
    for x in (weight, bias):
        if x is not None:
            x.requires_grad_(trained)
    leaves = [hidden, weight, bias]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    logits = exact[0] @ exact[1].T + (0 if bias is None else exact[2])
    value = definition(logits)
    (value * upstream.double()).sum().backward()
    token_weight = {"known": upstream / 7, "wrong": torch.ones_like(upstream), "none": None}[shares]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
        patch.setattr(divergence, "BLOCK_ELEMENTS", block)
        patch.setattr(divergence, "TILE_ROWS", 16)
        fused = measure(token_weight)(Projection(*leaves))
        (fused.value * upstream).sum().backward()
    assert fused.value.dtype == torch.float32 and not fused.entropy.requires_grad
    assert relative(fused.value.detach(), value.detach()) < tolerance
    assert relative(fused.entropy, entropy(logits.detach())) < tolerance
    for leaf, reference in zip(leaves, exact, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert leaf.grad.dtype == dtype and relative(leaf.grad, reference.grad) < tolerance
        elif leaf is not None:
            assert leaf.grad is None
    # the logits path, from the same logits
    plain = logits.detach().float().requires_grad_()
    unfused = measure(None, from_logits=True)(plain)
    torch.testing.assert_close(unfused.value.detach(), value.detach().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unfused.entropy, entropy(plain.detach()))
    (expected,) = torch.autograd.grad((definition(logits) * upstream.double()).sum(), logits)
    (grad,) = torch.autograd.grad((unfused.value * upstream).sum(), plain)
    assert relative(grad, expected) < 1e-4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(**CASES)
def test_fused_equals_float64_in_float32(trained, shares, chunk, block, **case):
    check_fused(case, torch.float32, 1e-4, trained, shares, chunk, block)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**CASES)
def test_fused_equals_float64_in_bfloat16(trained, shares, chunk, block, **case):
    check_fused(case, torch.bfloat16, 1e-2, trained, shares, chunk, block)


OTHER_HEAD = AnchorKL(0.7, Projection(torch.ones(5, 4).double(), torch.linspace(-1, 1, 36).double().view(9, 4)))


@pytest.mark.parametrize("measure", [AnchorKL(0.0), OTHER_HEAD, None])
def test_fused_gradient_by_finite_differences(measure):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (9, 4), (9,)]
    head = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    measure = measure or TokenNLL(torch.arange(5))
    assert torch.autograd.gradcheck(lambda *head: measure(Projection(*(x.clone() for x in head))).value, head)


def test_joint_asks_each_part_its_own():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(*shape, generator=generator) for shape in ((7, 4), (9, 4), (2, 9)))
    measures = [AnchorKL(0.5, other), TokenNLL(torch.arange(0)), TokenNLL(torch.arange(5))]
    for prediction in (Projection(hidden, weight), hidden @ weight.T):
        joint = Joint([2, 0, 5], measures)(prediction)
        rows = [slice(0, 2), slice(2, 2), slice(2, 7)]
        take = prediction.select if isinstance(prediction, Projection) else prediction.__getitem__
        alone = [measure(take(where)) for where, measure in zip(rows, measures, strict=True)]
        for column, columns in zip(joint, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(column, torch.cat(columns), rtol=0, atol=0)


def test_no_logits_outlive_their_chunk(monkeypatch):
    """The largest tensor of a step, forward and backward, has the size of a chunk."""
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 4 * 5000)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    with Watch():
        AnchorKL(0.5, Projection(torch.randn(64, 8)))(Projection(hidden, weight)).value.sum().backward()
    assert max(largest) == max(4 * 5000, weight.numel()) < 64 * 5000
    assert hidden.grad.abs().sum() > 0
