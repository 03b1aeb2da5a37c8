"""Objectives, against hand-worked cases. The trainer's tests compare whole losses with the formulas."""

import math

import pytest
import torch

from mdu_trainer.files import UserError
from mdu_trainer.masking import corrupt, counter_uniform
from mdu_trainer.objectives import OBJECTIVES, ForgetTerms, diffusion_bound


@pytest.fixture
def terms():
    """Two rows: the first with two masked tokens of four at t = 1/2, the second with one of two at t = 1/4."""
    return ForgetTerms(
        batch_index=torch.tensor([0, 0, 1]),
        num_masked=torch.tensor([2, 1]),
        num_response=torch.tensor([4, 2]),
        weight=torch.tensor([2.0, 4.0], dtype=torch.float64),
        kl=torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64),
        nll=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        reference_bound=torch.tensor([4.0, 2.0], dtype=torch.float64),
        preferred_bound=torch.tensor([3.0, 1.0], dtype=torch.float64),
        preferred_reference_bound=torch.tensor([2.0, 5.0], dtype=torch.float64),
    )


OPTIONS = {"beta": 0.5, "gamma": 0.25, "alpha": 2.0, "cap": 1.5}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


CASES = {
    # bounds are 2 * (1 + 2) = 6 and 4 * 0.5 = 2
    "mdu": [1.0, 3.0],
    "ga": [-6 / 4, -2 / 2],
    "bounded_ga": [-2 * (1 + 1.5) / 4, -2 / 2],  # the second token is below the bound
    # log p - log p_0 = 4 - 6 and 2 - 2
    "npo": [-4 * log_sigmoid(-0.5 * -2), -4 * log_sigmoid(0.0)],
    "simnpo": [-4 * log_sigmoid(0.5 * 6 / 4 - 0.25), -4 * log_sigmoid(0.5 * 2 / 2 - 0.25)],
    # p^2 = exp(-2), exp(-4), exp(-1)
    "wga": [-2 * (math.exp(-2) * 1 + math.exp(-4) * 2) / 4, -4 * math.exp(-1) * 0.5 / 2],
    # preferred log ratios are 2 - 3 and 5 - 1
    "dpo": [-log_sigmoid(0.5 * (-1 - -2)), -log_sigmoid(0.5 * (4 - 0))],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_hand_worked(name, terms):
    objective = OBJECTIVES[name]
    assert objective.loss(terms, **objective.chosen(OPTIONS)).tolist() == pytest.approx(CASES[name])


def test_bound_of_a_row_that_drew_nothing_is_zero(terms):
    assert diffusion_bound(terms.nll, terms.batch_index, torch.tensor([0.0, 4.0], dtype=torch.float64)).tolist() == [
        0,
        2,
    ]


def test_a_token_below_the_bound_of_ascent_has_no_gradient(terms):
    nll = terms.nll.clone().requires_grad_()
    OBJECTIVES["bounded_ga"].loss(terms._replace(nll=nll), cap=1.5).sum().backward()
    torch.testing.assert_close(nll.grad, torch.tensor([-2 / 4, 0.0, -4 / 2], dtype=torch.float64))
    with pytest.raises(UserError, match="cap must be above 0 nats, got -1"):
        OBJECTIVES["bounded_ga"].loss(terms, cap=-1)


def test_wga_weights_carry_no_gradient(terms):
    nll = terms.nll.clone().requires_grad_()
    OBJECTIVES["wga"].loss(terms._replace(nll=nll), alpha=2.0).sum().backward()
    expected = -torch.exp(-2 * terms.nll) * torch.tensor([2 / 4, 2 / 4, 4 / 2])
    torch.testing.assert_close(nll.grad, expected)


def test_bound_is_unbiased():
    """The mean of 1/t * (masked cross-entropy) over draws is the sum over tokens, when the tokens do not interact."""
    rows, length = 200_000, 3
    cross_entropy = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    ones = torch.ones(rows, length, dtype=torch.long)
    t = torch.linspace(1e-3, 1, rows)
    noise = counter_uniform(0, torch.arange(rows)[:, None], torch.arange(length)[None, :])
    masked = corrupt(ones, ones, ones, 0, t=t, noise=noise).masked
    weight = (noise < t[:, None]).any(1) / t.double()
    nll = cross_entropy.expand(rows, length)[masked]
    bound = diffusion_bound(nll, masked.nonzero()[:, 0], weight)
    assert bound.mean().item() == pytest.approx(cross_entropy.sum().item(), rel=0.02)
