"""Attacks that guess whether a row was trained on, and how far unlearning brings them down.

An attack gives each row a score, the higher the likelier it was trained on (a member). Those here need nothing but
`mdu_trainer.response_likelihood`: its `per_token` itself, the mean log-likelihood a token (Yeom et al., 2018, arXiv
1709.01604), and `min_k_score`, `zlib_score` and `reference_score`, which are functions of its result. The attack
`membership` of `mdu_trainer.attacks` has them, and others that look into the model.
"""

import math
import zlib
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ...files import UserError
from .base import RowMetric

DECIMALS = 4  # closer log-likelihoods are a tie, or the rounding of a batched forward would tell rows apart


class MembershipInference(RowMetric):
    """Area under the ROC curve of a score that is to tell members from other rows.

    The probability that a random member scores higher than a random other row, ties counting half: 1/2 is a guess, 1
    a certain leak. Below 1/2 members are told apart by scoring low: the sign of over-unlearning, which `two_sided`
    counts as a leak, too.

    Example:

        scores = [*forget.per_token, *holdout.per_token]  # of `response_likelihood`
        MembershipInference().compute(scores=scores, members=[1] * len(forget) + [0] * len(holdout))
    """

    inputs = {"scores": "number", "members": "flag"}
    source = "Yeom et al. Privacy Risk in Machine Learning. CSF 2018, arXiv 1709.01604"
    url = "https://arxiv.org/abs/1709.01604"

    def _compute(self, scores: list[float], members: list[int]) -> dict[str, float]:
        """
        Args:
            scores: list of float, a score a row, high for members.
            members: list of 0 or 1, 1 for rows that the model before unlearning was trained on.

        Returns:
            mia_auc: float in [0, 1].
            two_sided: float in [1/2, 1], as the function of this name.

        Raises:
            ValueError: for rows of one kind only.
        """
        area = _auc(scores, members)
        return {"mia_auc": area, "two_sided": two_sided(area)}


class PrivacyLeakage(RowMetric):
    """MUSE's relative AUC (Shi et al., 2025): how the attack fares against the model, and against one never trained.

        100 * (a - a_0) / a_0,  a = 1 - AUC on the unlearned model, a_0 = 1 - AUC on the retain model,

    in percent. 0 is perfect; towards -100, members are still recognised (under-unlearning); above 0, they stick out by
    being too unlikely (over-unlearning). MUSE's AUC is that of recognising non-members, hence the 1 - AUC.

    Example:

        PrivacyLeakage().compute(scores=scores, reference_scores=scores_of_retain_model, members=members)
    """

    inputs = {"scores": "number", "reference_scores": "number", "members": "flag"}
    source = "Shi et al. MUSE: Machine Unlearning Six-Way Evaluation for Language Models. ICLR 2025, arXiv 2407.06460"
    url = "https://arxiv.org/abs/2407.06460"

    def _compute(self, scores: list[float], reference_scores: list[float], members: list[int]) -> dict[str, float]:
        """
        Args:
            scores: list of float, the unlearned model's score of each row, high for members.
            reference_scores: list of float, those of a model trained on the retain rows alone.
            members: list of 0 or 1, 1 for forget rows, 0 for rows that no model was trained on.

        Returns:
            privacy_leakage: float, percent.

        Raises:
            ValueError: for rows of one kind only, or a retain model that the attack is never wrong about, to which
                nothing can be relative.
        """
        reference = 1 - _auc(reference_scores, members)
        if reference == 0:
            raise UserError(
                "The attack tells all members from the others on the retain model, which was trained on neither: the "
                "two kinds of rows differ by themselves. Choose others."
            )
        return {"privacy_leakage": 100 * (1 - _auc(scores, members) - reference) / reference}


def outscored(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """The share of the others that each score is above, ties counting half. Its mean is the area under the ROC curve.

    >>> outscored([3, 1], others=[0, 1, 2, 2])
    [1.0, 0.375]
    """
    of_row, others = np.asarray(scores)[:, None], np.asarray(others)
    return ((of_row > others) + (of_row == others) / 2).mean(axis=1).tolist()


def two_sided(area: float) -> float:
    """The area under the ROC curve, or that of the opposite guess if it is larger: 1/2 + |area - 1/2|.

    Rows that became too unlikely tell that they were deleted, as likely ones tell that they are known.

    >>> two_sided(0.25)
    0.75
    """
    return 0.5 + abs(area - 0.5)


def min_k_score(token_log_likelihoods: Sequence[Sequence[float]], k: float = 0.2) -> list[float]:
    """Mean over the share `k` of each row's tokens that are least likely (Min-K% Prob; Shi et al., arXiv 2310.16789).

    Of log-likelihoods that are standardised by their mean and spread over the vocabulary it is Min-K%++ (Zhang et al.,
    arXiv 2404.02936).

    An autoregressive model gives each token's log p directly. Here it is the token's part in the log-likelihood of the
    response: its mean log p over the orders of revealing (`Likelihood.tokens`).

    Args:
        token_log_likelihoods: of each row, log-likelihoods of its tokens, in nats.
        k: in (0, 1]; at least one token counts.

    Raises:
        ValueError: for a row without tokens, or k out of range.
    """
    if not 0 < k <= 1:
        raise UserError(f"k must be above 0 and at most 1, got {k}.")
    scores = []
    for row, tokens in enumerate(token_log_likelihoods):
        if not len(tokens):
            raise UserError(f"Row {row} has no tokens.")
        scores.append(float(np.sort(tokens)[: max(1, math.floor(k * len(tokens)))].mean()))
    return scores


def zlib_score(per_token: Sequence[float], texts: Sequence[str]) -> list[float]:
    """Mean log-likelihood a token over the bytes that zlib packs the text into (Carlini et al., arXiv 2012.07805).

    So texts that are likely because they repeat themselves do not pass for members.

    Raises:
        ValueError: for different numbers of likelihoods and texts.
    """
    if len(per_token) != len(texts):
        raise UserError(f"There are {len(per_token)} likelihoods and {len(texts)} texts: pass one of each a row.")
    return [float(value) / len(zlib.compress(text.encode())) for value, text in zip(per_token, texts, strict=True)]


def reference_score(per_token: Sequence[float], reference_per_token: Sequence[float]) -> list[float]:
    """Mean log-likelihood a token above that of a model that never saw the rows (Carlini et al., arXiv 2012.07805).

    So texts that any model finds likely do not pass for members.

    Raises:
        ValueError: for different numbers of likelihoods.
    """
    if len(per_token) != len(reference_per_token):
        raise UserError(
            f"There are {len(per_token)} likelihoods and {len(reference_per_token)} of the reference: pass one of "
            "each a row."
        )
    return [float(own) - float(other) for own, other in zip(per_token, reference_per_token, strict=True)]


def _auc(scores: list[float], members: list[int]) -> float:
    inside, outside = ([score for score, one in zip(scores, members, strict=True) if one == kind] for kind in (1, 0))
    if not inside or not outside:
        raise UserError(f"There must be members and others, but all {len(members)} rows are of one kind.")
    return fmean(outscored(inside, outside))
