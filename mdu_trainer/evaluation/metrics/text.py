"""Metrics of the text of generated answers."""

import re
from collections.abc import Sequence
from functools import lru_cache

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from ...data.words import UNSPACED, has_words, split_words
from ..registry import RowScores
from .base import RowMetric

LOOP_SHARE = 0.5  # text that people write repeats under a fifth of its pairs of words; three turns of a loop, more
LONGEST_GRAM = 4  # characters: pairs of letters repeat in any text of some length
STEMMED = 4  # letters, at least

_UNSPACED = regex.compile(UNSPACED, regex.V1)
_PIECE = re.compile(r"([^a-z0-9]*)([a-z0-9]+)([^a-z0-9]*)")


class RougeL(RowMetric):
    """ROUGE-L recall and F1 (Lin, 2004), with stemming, as TOFU reports it (Maini et al., 2024, arXiv 2401.06121).

    From the longest sequence of words that both texts contain in the same order (gaps allowed). Recall is its share of
    the words of the reference, F1 the harmonic mean of that and its share of the words of the prediction. Recall is
    what unlearning papers call rL: how much of the true answer came out, whatever was said beside it.

    Words are those of any script (`mdu_trainer.data.words`), English ones after Porter's stemmer, so scores on
    English text are those of the `rouge_score` package. A reference without a word, as of punctuation alone, is not
    measured.
    """

    inputs = {"predictions": "text", "references": "text"}
    source = "Lin, Chin-Yew. ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop 2004, W04-1013"
    url = "https://aclanthology.org/W04-1013"

    def _rows(self, predictions: list[str], references: list[str]) -> RowScores:
        """
        Args:
            predictions: list of str, the generated answers.
            references: list of str, the true answer of each.

        Returns:
            rougeL_recall, rougeL_f1: float in [0, 1]; not measured where the reference has no word.

        Example:

            >>> RougeL().compute(predictions=["The cat sat."], references=["The cat sat on the mat."])
            {'rougeL_recall': 0.5, 'rougeL_f1': 0.6666666666666666}
        """
        scorer = RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
        scores = [
            scorer.score(reference, prediction)["rougeL"] if has_words(reference) else None
            for reference, prediction in zip(references, predictions, strict=True)
        ]
        return {
            "rougeL_recall": [score and score.recall for score in scores],
            "rougeL_f1": [score and score.fmeasure for score in scores],
        }


class RougeTokenizer(Tokenizer):
    """The words of `mdu_trainer.data.words`, cut and stemmed as `rouge_score` cuts and stems Latin letters.

    To that package a letter outside of a-z ends a word: "Beltrán" is "beltr" and "n". The pieces here are as many, so
    that published figures keep, but they hold the letter: "beltrá" and "n". A word without any of a-z is whole.
    """

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, in order."""
        return [piece for word in split_words(text) for piece in _pieces(word)]


@lru_cache(maxsize=1 << 16)
def _pieces(word: str) -> tuple[str, ...]:
    """
    "gardens" -> ("garden",)   "exupéry" -> ("exupé", "ry")   "москва" -> ("москва",)
    """
    found = _PIECE.findall(word)
    stems = [_stemmer.stem(latin) if len(latin) >= STEMMED else latin for _, latin, _ in found]
    return tuple(before + stem + after for (before, _, after), stem in zip(found, stems, strict=True)) or (word,)


_stemmer = PorterStemmer()


class Degeneracy(RowMetric):
    """Share of answers that say nothing: a model that only stammers has not forgotten, it is broken.

    An answer is degenerate if it is

    - empty: no word is left without special tokens (see `mdu_trainer.data.words`: letters, digits, emoji);
    - special: it contains a special token (its end token ends it, and is not part of it);
    - repetitive: more than half of its pairs of neighbouring words were there before, which is seq-rep-2 > 0.5 of
      Welleck et al. (2020), 1 - distinct pairs / pairs. A phrase said three times over is. Where most words are
      characters of a script without spaces, it is up to seq-rep-4: pairs of letters repeat in any text.

    A refusal is not degenerate.

    Example:

        answers = tokenizer.batch_decode(ids)  # special tokens kept
        Degeneracy().compute(predictions=answers, special_tokens=tokenizer.all_special_tokens)
    """

    inputs = {"predictions": "text"}
    source = "Welleck et al. Neural Text Generation with Unlikelihood Training. ICLR 2020, arXiv 1908.04319"
    url = "https://arxiv.org/abs/1908.04319"

    def _rows(self, predictions: list[str], special_tokens: Sequence[str] = ()) -> RowScores:
        """
        Args:
            predictions: list of str, the generated answers, decoded with their special tokens.
            special_tokens: the tokenizer's.

        Returns:
            degeneracy, and its parts empty_rate, special_rate and repetition_rate, which overlap: float in [0, 1].

        Example:

            >>> Degeneracy().compute(predictions=["I do not know.", "la la la la la"])["degeneracy"]
            0.5
        """
        rows: RowScores = {name: [] for name in ("degeneracy", "empty_rate", "special_rate", "repetition_rate")}
        for text in predictions:
            plain = text
            for token in special_tokens:
                plain = plain.replace(token, " ")
            words = split_words(plain)
            failures = (not words, plain != text, _repeated(words) > LOOP_SHARE)
            for name, failed in zip(rows, (any(failures), *failures), strict=True):
                rows[name].append(float(failed))
        return rows


def _repeated(words: list[str]) -> float:
    """Share of sequences of neighbouring words that occurred before: of pairs, or of up to four characters."""
    characters = 2 * sum(_UNSPACED.match(word) is not None for word in words) > len(words)
    # a third of the text at most, so that three turns of a loop are seen
    length = max(2, min(LONGEST_GRAM, len(words) // 3)) if characters else 2
    grams = list(zip(*(words[i:] for i in range(length)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
