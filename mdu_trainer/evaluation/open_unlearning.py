"""OpenUnlearning's aggregate scores of TOFU's sets, and the metric that one of them needs beside those of `scoring`.

metrics = [*TOFU_METRICS, "exact_memorization", "extraction_strength", "paraphrase"]
evaluate_tofu(model, tokenizer, sets, metrics=metrics).run.summary["memorization_score"]
"""

from collections.abc import Mapping

from .metrics import Probability, TruthRatio, memorization_score, truth_share, utility_score
from .registry import Metric, RowScores, register_metric
from .results import Estimate, Scores
from .scoring import QuestionBatch

UTILITY = "model_utility"  # among the scores of the model
MEMORIZED = ("extraction_strength", "exact_memorization", "paraphrase_probability", "truth_share")
AGGREGATE_WORDS = {
    "memorization_score": "how little is memorised of the forget rows, by four scores (arXiv 2506.12618)",
    "utility_score": "harmonic mean of the model utility and of the share of answers that are not degenerate",
}


def aggregate_scores(scores: Mapping[str, Scores], summary: Mapping[str, Estimate]) -> dict[str, float]:
    """Return the aggregates of which all parts were measured: `memorization_score` and `utility_score`.

    Args:
        scores: name of a set -> its scores. Those of the rows to forget count.
        summary: scores of the model as a whole.
    """
    forget, found = scores["forget"], {}
    if all(name in forget for name in MEMORIZED):
        found["memorization_score"] = memorization_score(**{name: forget[name].value for name in MEMORIZED})
    if UTILITY in summary and "degeneracy" in forget:
        found["utility_score"] = utility_score(summary[UTILITY].value, 1 - forget["degeneracy"].value)
    return found


def _paraphrase(batch: QuestionBatch) -> RowScores:
    """How likely the true answer is in other words, by itself and beside wrong answers in those words."""
    true, wrong = batch.first("paraphrased"), batch.per_token("perturbed")
    ratios = TruthRatio().compute(per_token=true, wrong_per_token=wrong, variant="release", use_aggregator=False)
    probabilities = Probability().compute(per_token=true, use_aggregator=False)
    return {
        "paraphrase_probability": probabilities["probability"],
        "truth_share": truth_share(ratios["truth_ratio"]),
    }


register_metric(
    "paraphrase",
    Metric(
        _paraphrase,
        ("paraphrased", "perturbed"),
        {
            "paraphrase_probability": "probability of the true answer in other words, a token",
            "truth_share": "share of that probability beside the geometric mean of wrong answers'; 0.5 is a guess",
        },
    ),
)
