"""Metrics of the text of generated answers."""

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from transformers.utils import logging

from .base import RowMetric, Rows

logger = logging.get_logger(__name__)

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")  # scripts without spaces: a character a word
LOOP_SHARE = 0.5  # text that people write repeats under a fifth of its pairs of words; three turns of a loop, more


class RougeL(RowMetric):
    """ROUGE-L recall and F1 (Lin, 2004), with stemming, as TOFU reports it (Maini et al., 2024, arXiv 2401.06121).

    From the longest sequence of words that both texts contain in the same order (gaps allowed). Recall is its share of
    the words of the reference, F1 the harmonic mean of that and its share of the words of the prediction. Words are
    runs of Latin letters and digits, in lower case, after Porter's stemmer. Recall is what unlearning papers call rL:
    how much of the true answer came out, whatever was said beside it.

    Example:

        scores = RougeL().compute(predictions=answers, references=dataset["answer"])
    """

    inputs = {"predictions": "text", "references": "text"}
    source = "Lin, Chin-Yew. ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop 2004, W04-1013"
    url = "https://aclanthology.org/W04-1013"

    def _rows(self, predictions: list[str], references: list[str]) -> Rows:
        """
        Args:
            predictions: list of str, the generated answers.
            references: list of str, the true answer of each.
            use_aggregator: if False, a score for each row instead of the mean over rows. Defaults to True.

        Returns:
            rougeL_recall, rougeL_f1: float in [0, 1], or a list of them.

        Raises:
            ValueError: for empty input, columns of different lengths, or anything but texts in them.

        Example:

            >>> RougeL().compute(predictions=["The cat sat."], references=["The cat sat on the mat."])
            {'rougeL_recall': 0.5, 'rougeL_f1': 0.6666666666666666}
        """
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        scores = [scorer.score(*pair)["rougeL"] for pair in zip(references, predictions, strict=True)]
        wordless = sum(not any(char.isascii() and char.isalnum() for char in text) for text in references)
        if wordless:
            logger.warning(
                f"ROUGE-L is 0 for {wordless} of {len(references)} references without Latin letters or digits."
            )
        return {"rougeL_recall": [s.recall for s in scores], "rougeL_f1": [s.fmeasure for s in scores]}


class Degeneracy(RowMetric):
    """Share of answers that say nothing: a model that only stammers has not forgotten, it is broken.

    An answer is degenerate if it is

    - empty: no letter and no digit is left without special tokens;
    - special: it contains a special token (its end token ends it, and is not part of it);
    - repetitive: more than half of its pairs of neighbouring words were there before, which is seq-rep-2 > 0.5 of
      Welleck et al. (2020), 1 - distinct pairs / pairs. A phrase said three times over is.

    A refusal is not degenerate.

    Example:

        answers = tokenizer.batch_decode(ids)  # special tokens kept
        Degeneracy().compute(predictions=answers, special_tokens=tokenizer.all_special_tokens)
    """

    inputs = {"predictions": "text"}
    source = "Welleck et al. Neural Text Generation with Unlikelihood Training. ICLR 2020, arXiv 1908.04319"
    url = "https://arxiv.org/abs/1908.04319"

    def _rows(self, predictions: list[str], special_tokens: Sequence[str] = ()) -> Rows:
        """
        Args:
            predictions: list of str, the generated answers, decoded with their special tokens.
            special_tokens: the tokenizer's.
            use_aggregator: if False, 0 or 1 for each row instead of the share. Defaults to True.

        Returns:
            degeneracy, and its parts empty_rate, special_rate and repetition_rate, which overlap: float in [0, 1].

        Raises:
            ValueError: for empty input, or anything but texts in it.

        Example:

            >>> Degeneracy().compute(predictions=["I do not know.", "la la la la la"])["degeneracy"]
            0.5
        """
        rows: Rows = {name: [] for name in ("degeneracy", "empty_rate", "special_rate", "repetition_rate")}
        for text in predictions:
            plain = text
            for token in special_tokens:
                plain = plain.replace(token, " ")
            words = WORD.findall(plain.lower())
            failures = (not words, plain != text, _repeated_pairs(words) > LOOP_SHARE)
            for name, failed in zip(rows, (any(failures), *failures), strict=True):
                rows[name].append(float(failed))
        return rows


def _repeated_pairs(words: list[str]) -> float:
    """Share of pairs of neighbouring words that occurred before."""
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
