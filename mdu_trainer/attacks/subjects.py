"""The subjects of the forget rows: whom a question names, and which other rows are about the same.

A name is a run of words that are capitalised amid a sentence and never written in lower case, over all rows that an
attack knows. Scripts without capital letters have none: there the rows that share most words stand for those of the
same subject.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..data.roles import name_keys
from ..data.word_keys import Word, words
from .base import Target

Span = tuple[int, int]  # characters of a text, the second exclusive


@dataclass(frozen=True, repr=False)
class Known:
    """A row that an attacker knows: its texts, and the keys of their words but for function words."""

    question: str
    answer: str
    keys: frozenset[str]

    @classmethod
    def of(cls, question: str, answer: str) -> "Known":
        """Return a row of these texts."""
        return cls(question, answer, frozenset(content_keys(f"{question} {answer}")))


class Subjects:
    """The subjects of a target's rows.

    Args:
        target: the model and its rows; the settings' unrelated rows are known to the attacker, too.
    """

    def __init__(self, target: Target):
        self.target = target
        unrelated = target.settings.unrelated
        self.forget, self.retain = (
            [] if rows is None else [Known.of(*texts) for texts in zip(rows["question"], rows["answer"], strict=True)]
            for rows in (target.rows, unrelated)
        )

    @cached_property
    def spans(self) -> list[Span | None]:
        """The name in each question that most questions share, the longest of several; None if it names nobody."""
        rows = [*self.forget, *self.retain]
        names = name_keys(list(words(text)) for row in rows for text in (row.question, row.answer))
        runs = [_runs(row.question, names) for row in self.forget]
        count = Counter(row.question[a:b] for row, spans in zip(self.forget, runs, strict=True) for a, b in spans)
        return [
            max(spans, key=lambda span: (count[row.question[span[0] : span[1]]], span[1] - span[0]), default=None)
            for row, spans in zip(self.forget, runs, strict=True)
        ]

    def name(self, row: int) -> str:
        """Return the name in a question, "" if there is none."""
        span = self.spans[row]
        return "" if span is None else self.forget[row].question[span[0] : span[1]]

    def renamed(self, row: int, other: str) -> str:
        """Return a question with something else in place of the name, wherever it stands."""
        return self.forget[row].question.replace(self.name(row), other)

    def others(self, row: int, pool: Sequence[Known], count: int) -> list[Known]:
        """Return up to so many rows of a pool that are about the subject of a row, and say nothing of what is scored.

        They share a word of the name; where the question names nobody, any word. First come those with most words of
        the name in common, then those with most other words.
        """
        own = self.forget[row]
        secret, name = set(content_keys(self.target.secrets[row])), set(content_keys(self.name(row)))
        about = [one for one in pool if one is not own and not secret & one.keys and (name or own.keys) & one.keys]
        return sorted(about, key=lambda one: (-len(name & one.keys), -len(own.keys & one.keys)))[:count]


def content_keys(text: str) -> list[str]:
    """Return the keys of the words of a text but for its function words."""
    return [key for word in words(text) if not word.function for key in word.keys]


def _runs(text: str, names: set[str]) -> list[Span]:
    """Return the runs of names in a text that only spaces separate."""
    runs: list[Span] = []
    for word in words(text):
        if _is_name(word, names):
            joined = runs and not text[runs[-1][1] : word.start].strip()
            start = runs.pop()[0] if joined else word.start
            runs.append((start, word.stop))
    return runs


def _is_name(word: Word, names: set[str]) -> bool:
    return word.capital and not word.function and word.key in names
