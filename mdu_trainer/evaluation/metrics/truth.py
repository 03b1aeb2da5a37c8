"""TOFU's scores from likelihoods (Maini et al., 2024, arXiv 2401.06121).

All of them start from the mean log-likelihood a token of an answer, in nats: `Likelihood.per_token` of
`mdu_trainer.response_likelihood`. Its exp is p(a | q)^(1/|a|), the probability a token.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import hmean, ks_2samp

from ...files import UserError
from ..registry import RowScores
from .base import RowMetric, one_of
from .privacy import DECIMALS, outscored

TOFU = "Maini et al. TOFU: A Task of Fictitious Unlearning for LLMs. COLM 2024, arXiv 2401.06121"
TOFU_URL = "https://arxiv.org/abs/2401.06121"
LARGEST_LOG_RATIO = 700.0  # exp of it is finite; broken models go beyond

Aggregation = Literal["ratio", "forget", "retain"]


class Probability(RowMetric):
    """Probability of the true answer a token, p(a | q)^(1/|a|): what TOFU reports of forget and retain rows.

    Example:

        likelihood = response_likelihood(model, prompts, responses, backbone)
        Probability().compute(per_token=likelihood.per_token)
    """

    inputs = {"per_token": "number"}
    source, url = TOFU, TOFU_URL

    def _rows(self, per_token: list[float]) -> RowScores:
        """
        Args:
            per_token: list of float, mean log-likelihood a token of the true answers, in nats.

        Returns:
            probability: float in [0, 1].
        """
        return {"probability": np.exp(per_token).tolist()}


class ChoiceProbability(RowMetric):
    """Probability of the true answer among given ones: what TOFU reports of real authors and world facts.

    p(a | q)^(1/|a|) / sum over a' in {a, wrong answers} of p(a' | q)^(1/|a'|)
    """

    inputs = {"per_token": "number", "wrong_per_token": "numbers"}
    source, url = TOFU, TOFU_URL

    def _rows(self, per_token: list[float], wrong_per_token: list[list[float]]) -> RowScores:
        """
        Args:
            per_token: list of float, mean log-likelihood a token of the true answers, in nats.
            wrong_per_token: list of lists of float, those of each row's wrong answers.

        Returns:
            probability: float in [0, 1].
        """
        pairs = zip(per_token, wrong_per_token, strict=True)
        return {"probability": [float(np.exp(true - np.logaddexp.reduce([true, *wrong]))) for true, wrong in pairs]}


class TruthRatio(RowMetric):
    """The probability of wrong answers over that of the true one in other words: does the model prefer the truth?

        R = mean over wrong answers a' of p(a' | q)^(1/|a'|)  /  p(a | q)^(1/|a|)

    a is the paraphrased answer where the data has one, for a model may know its training data by heart, else the
    answer itself; wrong ones are in the wording of a. The paper takes the arithmetic mean over wrong answers
    (`variant="paper"`). The code released with it averages their losses, which is the geometric mean
    (`variant="release"`); it is never larger. (That code works with 1/R; aggregates and forget quality are the same.)
    OpenUnlearning's R is the release's, and so are its aggregations. Since its change 163 (December 2025) it has the
    mean of 1 / (1 + R) as a third one, which is no default; here `truth_share`.

    How rows are summed up is TOFU's, too: `aggregation="forget"`, mean of min(R, 1/R), is 1 if the model cannot tell
    truth from error; `"retain"`, mean of max(0, 1 - R), is 1 if it never errs; `"ratio"` is the mean of R.
    """

    inputs = {"per_token": "number", "wrong_per_token": "numbers"}
    source, url = TOFU, TOFU_URL

    def _rows(
        self,
        per_token: list[float],
        wrong_per_token: list[list[float]],
        variant: Literal["paper", "release"] = "paper",
        aggregation: Aggregation = "ratio",
    ) -> RowScores:
        """
        Args:
            per_token: list of float, mean log-likelihood a token of the true answers, in nats.
            wrong_per_token: list of lists of float, those of each row's wrong answers.
            variant: "paper" (arithmetic mean over wrong answers) or "release" (geometric mean).
            aggregation: "ratio", "forget" or "retain".

        Returns:
            truth_ratio: float, in [0, 1] unless aggregation is "ratio".
        """
        one_of("variant", variant, ("paper", "release"))
        mean = np.mean if variant == "release" else _log_mean_exp
        pairs = zip(per_token, wrong_per_token, strict=True)
        log_ratios = np.array([mean(wrong) - true for true, wrong in pairs])
        ratios = np.exp(log_ratios.clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
        return {"truth_ratio": aggregate_truth_ratios(ratios, aggregation)}


def aggregate_truth_ratios(ratios: Sequence[float], aggregation: Aggregation) -> list[float]:
    """A row's part in TOFU's mean: R, min(R, 1/R) ("forget") or max(0, 1 - R) ("retain"), for each ratio R > 0."""
    one_of("aggregation", aggregation, ("ratio", "forget", "retain"))
    ratios = np.asarray(ratios, dtype=np.float64)
    if aggregation == "forget":
        ratios = np.minimum(ratios, 1 / ratios)
    elif aggregation == "retain":
        ratios = np.maximum(0, 1 - ratios)
    return ratios.tolist()


class TrueRank(RowMetric):
    """The share of wrong answers that are less likely than the true one, ties counting half.

    1: the model knows the answer. 1/2: chance, which a model that never saw the row gives, on the mean of many rows.
    Below it the true answer has become less likely than wrong ones, so the model tells that it was deleted.

    Likelihoods are those a token, as in the truth ratio, from whose answers it is taken: a is the paraphrased answer
    where the data has one, and wrong ones are in the wording of a, or the wording would decide. The level to reach is
    known beforehand; that of the truth ratio takes a model that never saw the rows.

    Example:

        TrueRank().compute(per_token=[-1.0], wrong_per_token=[[-2.0, -1.0, -0.5]])  # 1 of 3, and a tie: true_rank 0.5
    """

    inputs = {"per_token": "number", "wrong_per_token": "numbers"}
    source, url = TOFU, TOFU_URL

    def _rows(self, per_token: list[float], wrong_per_token: list[list[float]]) -> RowScores:
        """
        Args:
            per_token: list of float, mean log-likelihood a token of the true answers, in nats.
            wrong_per_token: list of lists of float, those of each row's wrong answers.

        Returns:
            true_rank: float in [0, 1].
        """
        pairs = zip(per_token, wrong_per_token, strict=True)
        ranks = [outscored(np.round([true], DECIMALS), np.round(wrong, DECIMALS))[0] for true, wrong in pairs]
        return {"true_rank": ranks}


class ModelUtility(RowMetric):
    """The use that is left of a model: the harmonic mean of nine scores, so that one that is near 0 pulls all down.

    ROUGE-L recall, probability and truth ratio (`aggregation="retain"`) of the retain set, real authors and world
    facts, where the probability of the latter two is that among choices. 0 if any of them is 0.

    Example:

        ModelUtility().compute(figures=[scores[name][metric] for name in sets for metric in metrics])
    """

    inputs = {"figures": "number"}
    source, url = TOFU, TOFU_URL

    def _compute(self, figures: list[float]) -> dict[str, float]:
        """
        Args:
            figures: list of float of at least 0; the nine, or those that were measured.

        Returns:
            model_utility: float.

        Raises:
            ValueError: for a negative one.
        """
        if min(figures) < 0:
            raise UserError(f"figures must be at least 0, but figure {int(np.argmin(figures))} is {min(figures)}.")
        return {"model_utility": float(hmean(figures))}


class ForgetQuality(RowMetric):
    """Test whether the truth ratios on the forget rows tell the model from one that never saw them.

    p-value of the two-sample Kolmogorov-Smirnov test. Above 0.05 it cannot, which is as good as it gets; TOFU plots
    the logarithm. It needs equally many draws for the likelihoods of both, and it falls with the number of rows.
    """

    inputs = {"predictions": "number", "references": "number"}
    source, url = TOFU, TOFU_URL

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        """
        Args:
            predictions: list of float, truth ratios (`aggregation="ratio"`) of the unlearned model on the forget rows.
            references: list of float, those of a model trained on the retain rows alone, on the same rows.

        Returns:
            forget_quality: float in [0, 1], the p-value.
            ks_statistic: float in [0, 1], the largest distance of the two distribution functions.
        """
        test = ks_2samp(predictions, references)
        return {"forget_quality": float(test.pvalue), "ks_statistic": float(test.statistic)}


def _log_mean_exp(values: Sequence[float]) -> float:
    return float(np.logaddexp.reduce(values)) - float(np.log(len(values)))
