"""How far fast decoding is from exact decoding: measured wherever answers are decoded fast, and told with the scores.

Fast decoding (`DiffusionGenerationConfig.confidence_threshold`) reveals every token above a confidence at once. Its
answers are not quite those of exact decoding, so a sample of the rows is decoded exactly, too.
"""

from dataclasses import replace
from itertools import zip_longest

from ..files import UserError
from .registry import METRICS, Metric, RowScores, register_metric
from .scoring import OF_A_SAMPLE, QuestionBatch

SAMPLE = 16  # rows of a set at most, evenly spaced


def agreement_if_fast(batch: QuestionBatch) -> RowScores:
    """The scores of `fast_agreement` where answers were decoded fast for other scores, else none."""
    approximate = batch.set.decoding.confidence_threshold is not None and "fast_agreement" not in batch.set.metrics
    return _fast_agreement(batch) if approximate and {"decoded", "texts"} & vars(batch).keys() else {}


def token_agreement(fast: list[int], exact: list[int]) -> float:
    """The share of places at which two answers have the same token, of those of the longer one."""
    pairs = list(zip_longest(fast, exact))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def _fast_agreement(batch: QuestionBatch) -> RowScores:
    decoding, count = batch.set.decoding, len(batch.set)
    if decoding.confidence_threshold is None:
        raise UserError("The metric fast_agreement is for decoding='fast'; here answers are decoded exactly.")
    sample = {i * count // min(count, SAMPLE) for i in range(min(count, SAMPLE))}
    places = [i for i, row in enumerate(batch.rows) if row in sample]
    scores: RowScores = {name: [None] * len(batch.rows) for name in OF_A_SAMPLE}
    if not places:
        return scores
    exactly = replace(batch.set, decoding=replace(decoding, confidence_threshold=None))
    exact = replace(batch, set=exactly, rows=[batch.rows[i] for i in places])
    for i, ids in zip(places, exact.decoded, strict=True):
        scores["fast_token_agreement"][i] = token_agreement(batch.decoded[i], ids)
    if all(question.references for question in batch.questions):
        fast, slow = (METRICS["rougeL"].compute(one)["rougeL_recall"] for one in (batch, exact))
        for i, wanted in zip(places, slow, strict=True):
            found = fast[i]
            scores["fast_rougeL_error"][i] = None if found is None or wanted is None else abs(found - wanted)
    return scores


register_metric(
    "fast_agreement",
    Metric(
        _fast_agreement,
        words={
            "fast_token_agreement": "answers were decoded fast, an approximation: the share of their tokens that "
            "exact decoding gives, too, on a sample of the rows",
            "fast_rougeL_error": "how far, up or down, the ROUGE-L recall of an answer decoded fast is from that of "
            "one decoded exactly, on a sample of the rows",
        },
        titles={"fast_token_agreement": "fast = exact"},
    ),
)
