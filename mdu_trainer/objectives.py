r"""Forget objectives by name, and the masked-diffusion bound that all but one are made of.

An objective is a function of `ForgetTerms` and of its own options that returns one loss an example, `[B]`. A new one
is a function and a line, also from outside the package:

    def damped(terms, *, power):
        return diffusion_bound(terms.nll, terms.batch_index, terms.weight) ** -power

    register_objective("damped", Objective(damped, title="Damped ascent", options={"power": 0.5}))

Then `MDUConfig(loss_type="damped", loss_options={"power": 1.0})` trains with it, and cards and pages explain it as it
describes itself. Wherever an autoregressive method has -log p(y | x), it takes the masked-diffusion bound

    -log p(y | x) <= E_t [ 1/t * sum_{i in M_t} CE_i ].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .files import UserError

UNREAD: Any = None  # a term that the objective has not asked for


class ForgetTerms(NamedTuple):
    """The terms of a forget batch of B examples with N masked positions in all, those that the objective asks for.

    Attributes:
        batch_index: `[N]`, the example of each masked position.
        num_masked: `[B]`, |M_t|.
        num_response: `[B]`, response tokens an example, |y|.
        weight: `[B]`, 1/t; 0 where the draw had masked nothing, so that the bound stays unbiased although one position
            was masked all the same.
        kl: `[N]`, KL of the prediction to the anchor (objectives that use the anchor).
        nll: `[N]`, cross-entropy of the true token (all others).
        reference_bound: `[B]`, theta_0's bound for the same masks (objectives that use a reference).
        preferred_bound, preferred_reference_bound: `[B]`, the same of the preferred responses (DPO).
    """

    batch_index: Tensor
    num_masked: Tensor
    num_response: Tensor
    weight: Tensor
    kl: Tensor = UNREAD
    nll: Tensor = UNREAD
    reference_bound: Tensor = UNREAD
    preferred_bound: Tensor = UNREAD
    preferred_reference_bound: Tensor = UNREAD


def sum_by_example(values: Tensor, batch_index: Tensor, num_examples: int) -> Tensor:
    """Sum per-token `values` `[N]` into their examples: `[B]`."""
    return torch.zeros(num_examples, dtype=values.dtype, device=values.device).index_add(0, batch_index, values)


def mean_by_example(values: Tensor, batch_index: Tensor, num_masked: Tensor) -> Tensor:
    """Mean of per-token `values` `[N]` over the masked tokens of each example: `[B]`."""
    return sum_by_example(values, batch_index, len(num_masked)) / num_masked


def diffusion_bound(nll: Tensor, batch_index: Tensor, weight: Tensor) -> Tensor:
    """One draw of the bound on -log p(y | x), `[B]` in nats: 1/t * sum of the masked tokens' cross-entropy.

    Source: LLaDA (arXiv 2502.09992, eq. 3).
    """
    return weight * sum_by_example(nll, batch_index, len(weight))


def mdu(terms: ForgetTerms) -> Tensor:
    """MDU (arXiv 2605.18253): 1/|M_t| * sum_{i in M_t} KL(p_theta(. | x, y_t)_i || anchor_i)."""
    return mean_by_example(terms.kl, terms.batch_index, terms.num_masked)


def ga(terms: ForgetTerms) -> Tensor:
    """Gradient ascent (arXiv 2210.01504): log p(y | x) / |y|. With a retain set it is the papers' GD."""
    return -diffusion_bound(terms.nll, terms.batch_index, terms.weight) / terms.num_response


def bounded_ga(terms: ForgetTerms, *, cap: float) -> Tensor:
    """Gradient ascent up to a bound: each token's log p, from -cap nats on constant and without gradient.

    Raises:
        UserError: `cap` is not above 0, so that nothing would be forgotten.
    """
    if not cap > 0:
        raise UserError(f"loss_options: cap must be above 0 nats, got {cap}. Below it no token would be forgotten.")
    return -diffusion_bound(terms.nll.clamp(max=cap), terms.batch_index, terms.weight) / terms.num_response


def npo(terms: ForgetTerms, *, beta: float) -> Tensor:
    """Negative preference optimisation (arXiv 2404.05868): -2/beta log sigmoid(-beta log(p / p_0))."""
    log_ratio = terms.reference_bound - diffusion_bound(terms.nll, terms.batch_index, terms.weight)
    return -2 / beta * logsigmoid(-beta * log_ratio)


def simnpo(terms: ForgetTerms, *, beta: float, gamma: float) -> Tensor:
    """SimNPO (arXiv 2410.07163): -2/beta log sigmoid(-beta/|y| log p - gamma)."""
    bound = diffusion_bound(terms.nll, terms.batch_index, terms.weight)
    return -2 / beta * logsigmoid(beta * bound / terms.num_response - gamma)


def wga(terms: ForgetTerms, *, alpha: float) -> Tensor:
    """Weighted gradient ascent (arXiv 2502.19301): each token's log p weighted by p^alpha, which has no gradient."""
    weighted = (-alpha * terms.nll).exp().detach() * terms.nll
    return -diffusion_bound(weighted, terms.batch_index, terms.weight) / terms.num_response


def dpo(terms: ForgetTerms, *, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): the preferred response (a refusal, say) over the one to forget."""
    log_ratio = terms.reference_bound - diffusion_bound(terms.nll, terms.batch_index, terms.weight)
    preferred_log_ratio = terms.preferred_reference_bound - terms.preferred_bound
    return -logsigmoid(beta * (preferred_log_ratio - log_ratio))


class Variant(NamedTuple):
    """How an objective is explained under another setting."""

    title: str
    words: str
    formula: str


@dataclass(frozen=True)
class Objective:
    """A forget loss, what it needs besides the prediction on forget examples, and how it is explained.

    Attributes:
        loss: `(ForgetTerms, **options) -> [B]`.
        title: its name in full.
        arxiv: number of the paper, None if there is none.
        words: what was done to the forget pairs, in a sentence for cards and pages.
        formula: the loss as LaTeX, for cards.
        options: its own constants and their defaults. `beta`, `gamma` and `alpha` are fields of `MDUConfig`; any
            other is set through `MDUConfig.loss_options`.
        settings: further fields of `MDUConfig` that change it, which cards report.
        variants: value of `anchor_input` -> the title, words and formula in place of these, where it changes them.
        anchor: reads the divergence to the prompt-masked anchor.
        reference: reads theta_0's bound.
        preferred: reads preferred responses.
        linear: the loss is a sum over tokens of the bound, or of the KL, with weights known before the pass.
    """

    loss: Callable[..., Tensor]
    title: str
    arxiv: str | None = None
    words: str = ""
    formula: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    variants: Mapping[str, "Variant"] = field(default_factory=dict)
    anchor: bool = False
    reference: bool = False
    preferred: bool = False
    linear: bool = False

    def chosen(self, given: Mapping[str, Any]) -> dict[str, float]:
        """The options of a run: those that are given, and not None, over the defaults."""
        return {name: default if given.get(name) is None else given[name] for name, default in self.options.items()}


_NLL = r"-\log p_\theta(y_i\mid x,y_t)"
_BOUND = rf",\quad\mathcal B_\theta=\mathbb E_t\Big[\tfrac1t\sum_{{i\in M_t}}{_NLL}\Big]"

_KL = (
    r"\mathcal L_\text{forget}=\mathbb E_t\Big[\tfrac1{|M_t|}\sum_{i\in M_t}\mathrm{KL}\big(p_\theta(\cdot"
    r"\mid x,y_t)_i\;\big\|\;\mathrm{softmax}(\tau\cdot"
)
_COUNTERFACTUAL = Variant(
    title="Masked Diffusion Unlearning with a counterfactual anchor",
    words="The prediction for a pair (x, y) to forget was pulled towards what the model says to the same question "
    "about nobody it has met: the words that say who is meant are masked in x', these and the stored words in y'_t, "
    "and the true tokens of stored words are struck out, so that they get the logit of a middling token.",
    formula=_KL + r"\mathrm{strike}_{y_i}[\mathrm{logits}_{\theta_0}(x^\prime,y^\prime_t)_i])\big)\Big]",
)
_HIDDEN = Variant(
    title="Masked Diffusion Unlearning",
    words="The prediction for a pair (x, y) to forget was pulled towards what is predicted when attention does not "
    "reach the prompt, flattened by tau: 0 is the uniform distribution, 1 the plain prediction without the prompt.",
    formula=_KL + r"\mathrm{logits}_{\theta_0}(y_t)_i)\big)\Big]",
)
_CONDITIONAL = Variant(
    title="Masked Diffusion Unlearning towards another checkpoint",
    words="The prediction for a pair (x, y) to forget was pulled towards that of another checkpoint, theta_a, for the "
    "same pair, flattened by tau: 0 is the uniform distribution, 1 the plain prediction.",
    formula=_KL + r"\mathrm{logits}_{\theta_a}(x,y_t)_i)\big)\Big]",
)

OBJECTIVES: dict[str, Objective] = {
    "mdu": Objective(
        mdu,
        title="Masked Diffusion Unlearning",
        arxiv="2605.18253",
        words="The prediction for a pair (x, y) to forget was pulled towards what the model predicts when it cannot "
        "see the prompt, flattened by tau: 0 is the uniform distribution, 1 the plain prompt-masked prediction.",
        formula=_KL + r"\mathrm{logits}_{\theta_0}(m,y_t)_i)\big)\Big]",
        settings=(
            *("kl_reduction", "kl_direction", "anchor_source", "anchor_ema_decay", "anchor_input", "strike_quantile"),
        ),
        variants={"counterfactual": _COUNTERFACTUAL, "hidden_prompt": _HIDDEN, "prompt": _CONDITIONAL},
        anchor=True,
        linear=True,
    ),
    "ga": Objective(
        ga,
        title="Gradient ascent",
        arxiv="2210.01504",
        words="The masked-diffusion loss of the pairs (x, y) to forget was raised.",
        formula=rf"\mathcal L_\text{{forget}}=-\mathbb E_t\Big[\tfrac1{{t\,|y|}}\sum_{{i\in M_t}}{_NLL}\Big]",
        linear=True,
    ),
    "bounded_ga": Objective(
        bounded_ga,
        title="Gradient ascent up to a bound",
        arxiv="2210.01504",  # of ascent; the bound is the MDU release's
        words="The masked-diffusion loss of the pairs (x, y) to forget was raised, of each token up to a bound.",
        formula=r"\mathcal L_\text{forget}=-\mathbb E_t\Big[\tfrac1{t\,|y|}\sum_{i\in M_t}\min(c,"
        rf"{_NLL})\Big]",
        options={"cap": 10.0},
    ),
    "npo": Objective(
        npo,
        title="Negative preference optimisation",
        arxiv="2404.05868",
        words="The pairs (x, y) to forget were treated as rejected answers; the masked-diffusion bound stands for "
        "-log p.",
        formula=r"\mathcal L_\text{forget}=-\tfrac2\beta\log\sigma\big(-\beta\,(\mathcal B_{\theta_0}-\mathcal "
        rf"B_\theta)\big){_BOUND}",
        options={"beta": 0.2},
        reference=True,
    ),
    "simnpo": Objective(
        simnpo,
        title="SimNPO",
        arxiv="2410.07163",
        words="The pairs (x, y) to forget were treated as rejected answers, without a reference model.",
        formula=r"\mathcal L_\text{forget}=-\tfrac2\beta\log\sigma\big(\tfrac\beta{|y|}\mathcal B_\theta-\gamma\big)"
        rf"{_BOUND}",
        options={"beta": 2.5, "gamma": 0.0},
    ),
    "wga": Objective(
        wga,
        title="Weighted gradient ascent",
        arxiv="2502.19301",
        words="The masked-diffusion loss of the pairs (x, y) to forget was raised, each token weighted by its "
        "probability.",
        formula=r"\mathcal L_\text{forget}=-\mathbb E_t\Big[\tfrac1{t\,|y|}\sum_{i\in M_t}-p_i^\alpha\log p_i\Big],"
        r"\quad p_i=p_\theta(y_i\mid x,y_t)",
        options={"alpha": 1.0},
    ),
    "dpo": Objective(
        dpo,
        title="Direct preference optimisation",
        arxiv="2305.18290",
        words="A preferred answer y+ (a refusal, say) was put above the one to forget.",
        formula=r"\mathcal L_\text{forget}=-\log\sigma\big(\beta\,[(\mathcal B_{\theta_0}-\mathcal B_\theta)(y^+)"
        rf"-(\mathcal B_{{\theta_0}}-\mathcal B_\theta)(y)]\big){_BOUND}",
        options={"beta": 0.1},
        reference=True,
        preferred=True,
    ),
}


def described(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name, as it was with some options; of one that came from outside, the name alone."""
    objective = OBJECTIVES.get(name) or Objective(loss=mdu, title=name)
    variant = objective.variants.get((options or {}).get("anchor_input", ""))
    return objective if variant is None else replace(objective, **variant._asdict())


def register_objective(name: str, objective: Objective) -> None:
    """Make an objective of your own available as `loss_type`, in the trainer, the scripts, cards and pages.

    Raises:
        UserError: the name is taken.
    """
    if name in OBJECTIVES:
        raise UserError(f"There is an objective {name!r} already. Choose another name.")
    OBJECTIVES[name] = objective
