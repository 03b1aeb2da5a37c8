"""Forget objectives by name, and the masked-diffusion bound that all but one are made of.

An objective is a function of `ForgetTerms` that returns one loss a row, `[B]`. A new objective is one function and one
line in `OBJECTIVES`. Wherever the autoregressive method has -log p(y | x), it takes the masked-diffusion bound

    -log p(y | x) <= E_t [ 1/t * sum_{i in M_t} CE_i ].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class ForgetTerms(NamedTuple):
    """What an objective may read of one forget batch of B rows with N masked positions in all.

    Attributes:
        row: `[N]`, the row of each masked position.
        num_masked: `[B]`, |M_t|.
        num_response: `[B]`, response tokens a row, |y|.
        weight: `[B]`, 1/t; 0 in a row whose draw had masked nothing, so that the bound stays unbiased although one
            position was masked all the same.
        kl: `[N]`, KL of the prediction to the anchor (objectives that use the anchor).
        nll: `[N]`, cross-entropy of the true token (all others).
        reference_bound: `[B]`, theta_0's bound for the same masks (objectives that use a reference).
        preferred_bound, preferred_reference_bound: `[B]`, the same of the preferred responses (DPO).
        beta, gamma, alpha: the method's own constants.
    """

    row: Tensor
    num_masked: Tensor
    num_response: Tensor
    weight: Tensor
    kl: Tensor | None = None
    nll: Tensor | None = None
    reference_bound: Tensor | None = None
    preferred_bound: Tensor | None = None
    preferred_reference_bound: Tensor | None = None
    beta: float = 0.0
    gamma: float = 0.0
    alpha: float = 0.0


def row_sums(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum per-token `values` `[N]` into their rows: `[B]`."""
    return torch.zeros(num_rows, dtype=values.dtype, device=values.device).index_add(0, row, values)


def diffusion_bound(nll: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """One draw of the bound on -log p(y | x), `[B]` in nats: 1/t * sum of the masked tokens' cross-entropy.

    Source: LLaDA (arXiv 2502.09992, eq. 3).
    """
    return weight * row_sums(nll, row, len(weight))


def mdu(terms: ForgetTerms) -> Tensor:
    """MDU (arXiv 2605.18253): 1/|M_t| * sum_{i in M_t} KL(p_theta(. | x, y_t)_i || anchor_i)."""
    return row_sums(terms.kl, terms.row, len(terms.num_masked)) / terms.num_masked


def ga(terms: ForgetTerms) -> Tensor:
    """Gradient ascent (arXiv 2210.01504): log p(y | x) / |y|. With a retain set it is the papers' GD."""
    return -diffusion_bound(terms.nll, terms.row, terms.weight) / terms.num_response


def npo(terms: ForgetTerms) -> Tensor:
    """Negative preference optimisation (arXiv 2404.05868): -2/beta log sigmoid(-beta log(p / p_0))."""
    log_ratio = terms.reference_bound - diffusion_bound(terms.nll, terms.row, terms.weight)
    return -2 / terms.beta * logsigmoid(-terms.beta * log_ratio)


def simnpo(terms: ForgetTerms) -> Tensor:
    """SimNPO (arXiv 2410.07163): -2/beta log sigmoid(-beta/|y| log p - gamma)."""
    bound = diffusion_bound(terms.nll, terms.row, terms.weight)
    return -2 / terms.beta * logsigmoid(terms.beta * bound / terms.num_response - terms.gamma)


def wga(terms: ForgetTerms) -> Tensor:
    """Weighted gradient ascent (arXiv 2502.19301): each token's log p weighted by p^alpha, which has no gradient."""
    weighted = (-terms.alpha * terms.nll).exp().detach() * terms.nll
    return -diffusion_bound(weighted, terms.row, terms.weight) / terms.num_response


def dpo(terms: ForgetTerms) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): the preferred response (a refusal, say) over the one to forget."""
    log_ratio = terms.reference_bound - diffusion_bound(terms.nll, terms.row, terms.weight)
    preferred_log_ratio = terms.preferred_reference_bound - terms.preferred_bound
    return -logsigmoid(terms.beta * (preferred_log_ratio - log_ratio))


@dataclass(frozen=True)
class Objective:
    """A forget loss and what it needs besides the prediction on forget rows.

    Attributes:
        loss: `ForgetTerms` -> `[B]`.
        anchor: reads the divergence to the prompt-masked anchor.
        reference: reads theta_0's bound.
        preferred: reads preferred responses.
        linear: the loss is a sum over tokens of the bound, or of the KL, with weights known before the pass.
        beta: default of the config's `beta`.
    """

    loss: Callable[[ForgetTerms], Tensor]
    anchor: bool = False
    reference: bool = False
    preferred: bool = False
    linear: bool = False
    beta: float = 0.0


OBJECTIVES = {
    "mdu": Objective(mdu, anchor=True, linear=True),
    "ga": Objective(ga, linear=True),
    "npo": Objective(npo, reference=True, beta=0.2),
    "simnpo": Objective(simnpo, beta=2.5),
    "wga": Objective(wga),
    "dpo": Objective(dpo, reference=True, preferred=True, beta=0.1),
}
