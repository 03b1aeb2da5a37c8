"""Metrics of what a model still says, as `evaluate.Metric` classes that download nothing, and intervals for them."""

from .aggregates import memorization_score, privacy_score, truth_share, utility_score
from .base import RowMetric
from .intervals import bootstrap_interval
from .memorization import ExactMemorization, ExtractionStrength, greedy_completions, shortest_prefixes
from .privacy import (
    MembershipInference,
    PrivacyLeakage,
    min_k_score,
    outscored,
    reference_score,
    two_sided,
    zlib_score,
)
from .text import Degeneracy, RougeL
from .truth import (
    ChoiceProbability,
    ForgetQuality,
    ModelUtility,
    Probability,
    TrueRank,
    TruthRatio,
    aggregate_truth_ratios,
)

__all__ = [
    "ChoiceProbability",
    "Degeneracy",
    "ExactMemorization",
    "ExtractionStrength",
    "ForgetQuality",
    "MembershipInference",
    "ModelUtility",
    "PrivacyLeakage",
    "Probability",
    "RougeL",
    "RowMetric",
    "TrueRank",
    "TruthRatio",
    "aggregate_truth_ratios",
    "bootstrap_interval",
    "greedy_completions",
    "memorization_score",
    "min_k_score",
    "outscored",
    "privacy_score",
    "reference_score",
    "shortest_prefixes",
    "truth_share",
    "two_sided",
    "utility_score",
    "zlib_score",
]
