"""Metrics of generated answers, as `evaluate.Metric` classes that download nothing."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from transformers.utils import logging

logger = logging.get_logger(__name__)

_CITATION = """\
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    publisher = "Association for Computational Linguistics",
    url = "https://aclanthology.org/W04-1013",
    pages = "74--81",
}
"""

_DESCRIPTION = """\
ROUGE-L of a generated answer against the true one, from the longest sequence of words that both contain in the same
order (gaps allowed). Recall is its share of the words of the reference, F1 the harmonic mean of that and its share of
the words of the prediction. Words are runs of Latin letters and digits, in lower case, after Porter's stemmer.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: list of str, the generated answers.
    references: list of str, the true answer of each.
    use_aggregator: if False, a score for each row instead of the mean over rows. Defaults to True.

Returns:
    rougeL_recall, rougeL_f1: float in [0, 1], or a list of them.

Raises:
    ValueError: for empty input, numbers of predictions and references that differ, or anything but texts in them.

Example:

    >>> RougeL().compute(predictions=["The cat sat."], references=["The cat sat on the mat."])
    {'rougeL_recall': 0.5, 'rougeL_f1': 0.6666666666666666}
"""


class RougeL(evaluate.Metric):
    """ROUGE-L recall and F1 (Lin, 2004), with stemming, as TOFU reports it (Maini et al., 2024, arXiv 2401.06121).

    Recall is what unlearning papers call rL: how much of the true answer came out, whatever was said beside it. Texts
    stay in memory, where `evaluate` would write them to its cache, and no error message quotes them.

    Args:
        kwargs: those of `evaluate.Metric`.

    Example:

        scores = RougeL().compute(predictions=answers, references=dataset["answer"])
    """

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://aclanthology.org/W04-1013"],
        )

    def compute(
        self, *, predictions: Sequence[str] | None = None, references: Sequence[str] | None = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Score these rows, and those added before."""
        if predictions is None and references is None and len(self) == 0:
            raise ValueError("There is nothing to score: no predictions were given or added.")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: str | None = None, reference: str | None = None, **kwargs: Any) -> None:
        """Add one row to score later."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(
        self, *, predictions: Sequence[str] | None = None, references: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Add rows to score later."""
        _check_texts(predictions, references)
        super().add_batch(predictions=list(predictions), references=list(references), **kwargs)

    def _compute(
        self, predictions: list[str], references: list[str], use_aggregator: bool = True
    ) -> dict[str, float] | dict[str, list[float]]:
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        scores = [scorer.score(*pair)["rougeL"] for pair in zip(references, predictions, strict=True)]
        wordless = sum(not any(char.isascii() and char.isalnum() for char in text) for text in references)
        if wordless:
            logger.warning(
                f"ROUGE-L is 0 for {wordless} of {len(references)} references without Latin letters or digits."
            )
        rows = {"rougeL_recall": [s.recall for s in scores], "rougeL_f1": [s.fmeasure for s in scores]}
        return {name: fmean(values) for name, values in rows.items()} if use_aggregator else rows


def _check_texts(predictions: Sequence[str] | None, references: Sequence[str] | None) -> None:
    """Raise before `evaluate` does, whose messages quote the texts."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if texts is None or isinstance(texts, str) or not hasattr(texts, "__len__"):
            raise ValueError(f"{name} must be a list of texts, got {type(texts).__name__}.")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name} must be texts, but row {row} is {type(text).__name__}.")
    if len(predictions) != len(references):
        raise ValueError(
            f"There must be one reference a prediction, got {len(predictions)} predictions and "
            f"{len(references)} references."
        )
    if len(predictions) == 0:
        raise ValueError("There is nothing to score: predictions and references are empty.")
